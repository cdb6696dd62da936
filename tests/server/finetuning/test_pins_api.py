"""Pinning adapters over a real socket: what is kept, what is refused, and what the engine is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

CONFIG = json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}).encode()


def _upload(live: Any, name: str, weights: bytes) -> Any:
    files = {
        "adapter_config.json": ("adapter_config.json", CONFIG),
        "adapter_model.safetensors": ("adapter_model.safetensors", weights),
    }
    return live.http.post("/v1/adapters", data={"name": name}, files=files).json()


def _post(live: Any, name: str, verb: str = "pin") -> Any:
    return live.http.post(f"/v1/adapters/{name}/{verb}")


def _newest_digest(adapter: Any) -> str:
    return str(adapter["versions"][-1]["digest"])


@pytest.fixture(autouse=True)
def _no_pins(live: Any) -> Any:
    yield
    for adapter in live.http.get("/v1/adapters").json()["data"]:
        assert live.http.delete(f"/v1/adapters/{adapter['id']}").status_code == 200
    live.until(lambda: not live.engine.pinned or live.engine.pinned[-1] == [])


def test_a_pin_is_shown_told_to_the_engine_and_undone(live: Any) -> None:
    uploaded = _upload(live, "support", b"one")
    assert uploaded["pinned"] is False
    for _ in range(2):
        reply = _post(live, "support")
        assert reply.status_code == 200, reply.text
        assert reply.json()["pinned"] is True
    live.until(lambda: live.engine.pinned and live.engine.pinned[-1] == [_newest_digest(uploaded)])
    assert live.http.get("/v1/adapters/support").json()["pinned"] is True
    assert [a["pinned"] for a in live.http.get("/v1/adapters").json()["data"]] == [True]
    for _ in range(2):
        assert _post(live, "support", "unpin").json()["pinned"] is False
    live.until(lambda: live.engine.pinned[-1] == [])


def test_a_new_version_takes_the_pin_over_and_deletion_ends_it(live: Any) -> None:
    _upload(live, "support", b"one")
    _post(live, "support")
    second = _upload(live, "support", b"two")
    assert second["pinned"] is True
    live.until(lambda: live.engine.pinned[-1] == [_newest_digest(second)])
    live.http.delete("/v1/adapters/support")
    live.until(lambda: live.engine.pinned[-1] == [])
    assert _upload(live, "support", b"three")["pinned"] is False


def test_every_new_engine_is_told_the_pins(live: Any) -> None:
    uploaded = _upload(live, "support", b"one")
    _post(live, "support")
    live.until(lambda: live.engine.pinned and live.engine.pinned[-1])
    live.engine.pinned.clear()
    live.call(live.engine.restart())
    live.until(lambda: live.engine.pinned == [[_newest_digest(uploaded)]])


def test_more_than_the_tenants_share_is_a_conflict_with_sizes_and_remedy(live: Any) -> None:
    """Each takes 4096 bytes; this tenant may pin half of 20,000."""
    for idx in range(3):
        _upload(live, f"a{idx}", b"weights %d" % idx)
    assert [_post(live, f"a{idx}").status_code for idx in range(2)] == [200, 200]
    reply = _post(live, "a2")
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (409, "pin_limit_exceeded")
    assert "0.0 MiB" in error["message"]
    assert "unpin another adapter" in error["message"]
    _post(live, "a0", "unpin")
    assert _post(live, "a2").status_code == 200


def test_another_tenants_adapter_and_an_unknown_one_are_404(live: Any) -> None:
    _upload(live, "support", b"one")
    other = {"authorization": f"Bearer {live.other.api_key}"}
    for verb in ("pin", "unpin"):
        assert _post(live, "nothing", verb).status_code == 404
        reply = live.http.post(f"/v1/adapters/support/{verb}", headers=other)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert live.http.post("/v1/adapters/support/pin?force=1").status_code == 400


def test_before_any_engine_has_been_ready_a_pin_is_refused_for_now(live: Any) -> None:
    _upload(live, "support", b"one")
    info, live.engine.info = live.engine.info, None
    try:
        reply = _post(live, "support")
        assert reply.status_code == 503
        assert "retry-after" in reply.headers
    finally:
        live.engine.info = info
