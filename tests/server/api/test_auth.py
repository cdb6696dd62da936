"""API keys: who is let in, what they see, and reloading them."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import openai
import pytest

from weft_server.service.tenants import new_key

BASE = "base-model"
ALICE, BOB, ADMIN = new_key(), new_key(), new_key()
KEYS = f"""
[[tenants]]
name = "alice"
keys = ["{ALICE.digest}"]

[[tenants]]
name = "bob"
weight = 2
keys = ["{BOB.digest}"]

[[tenants]]
name = "ops"
admin = true
keys = ["{ADMIN.digest}"]
"""


@pytest.fixture
def api(start_api: Any) -> Any:
    return start_api(keys=KEYS)


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        ("", "missing_api_key"),
        ("Basic abc", "invalid_api_key"),
        ("Bearer", "invalid_api_key"),
        ("Bearer nonsense", "invalid_api_key"),
        (f"Bearer {ALICE.digest}", "invalid_api_key"),
        (f"Bearer {ALICE.secret[:-1]}", "invalid_api_key"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/models/base-model"])
def test_without_a_known_key_nothing_is_shown(api: Any, header: str | None, code: str, path: str) -> None:
    response = api.http.get(path, headers={} if header is None else {"authorization": header})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == code
    assert response.headers["www-authenticate"] == "Bearer"


def test_generation_needs_a_key_before_its_body_is_looked_at(api: Any) -> None:
    response = api.http.post("/v1/completions", content=b"{")
    assert response.status_code == 401


def test_health_and_readiness_need_no_key(api: Any) -> None:
    assert api.http.get("/health").status_code == 200
    assert api.http.get("/ready").status_code == 200


def test_a_key_stands_for_its_tenant_who_sees_only_its_own(api: Any) -> None:
    api.store_adapter("alice", "poet")
    api.client(ALICE.secret).completions.create(model="poet", prompt="x")
    assert api.engine.requests[0].tenant == "alice"
    assert [model.id for model in api.client(BOB.secret).models.list().data] == [BASE]
    with pytest.raises(openai.NotFoundError):
        api.client(BOB.secret).completions.create(model="poet", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        api.client("weft-guess").completions.create(model="poet", prompt="x")


def test_metrics_need_an_admin_key(api: Any) -> None:
    refused = api.http.get("/metrics", headers={"authorization": f"Bearer {ALICE.secret}"})
    assert refused.status_code == 403
    assert refused.json()["error"]["type"] == "permission_error"
    assert api.http.get("/metrics", headers={"authorization": f"bearer {ADMIN.secret}"}).status_code == 200


def test_a_hangup_signal_reloads_the_keys_and_a_bad_file_changes_nothing(
    start_api: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from weft_server.api.app import create_app

    api = start_api(keys=KEYS)
    tenants = api.services.tenants
    app = create_app(api.services)

    async def hang_up_after(text: str) -> None:
        api.keys_file.write_text(text, encoding="utf-8")
        async with app.router.lifespan_context(app):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0)
            while not reloaded:
                await asyncio.sleep(0)

    reloaded: list[bool] = []
    reload = tenants.reload

    def noting_reload() -> bool:
        reloaded.append(reload())
        return reloaded[-1]

    tenants.reload = noting_reload
    asyncio.run(hang_up_after("[[tenants]]\nname = 5\n"))
    assert reloaded == [False]
    assert "keeping the previous API keys" in caplog.text
    assert api.client(ALICE.secret).models.list().data
    reloaded.clear()
    asyncio.run(
        hang_up_after(
            f'[[tenants]]\nname = "carol"\nweight = 3\nmax_concurrency = 5\nkeys = ["{BOB.digest}"]\n'
        )
    )
    assert reloaded == [True]
    assert api.engine.tenant_weights == {"carol": 3.0}
    assert api.engine.tenant_concurrency == {"carol": 5}
    with pytest.raises(openai.AuthenticationError):
        api.client(ALICE.secret).models.list()
    api.client(BOB.secret).completions.create(model=BASE, prompt="x")
    assert api.engine.requests[-1].tenant == "carol"
