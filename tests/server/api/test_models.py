"""/v1/models, and which adapter version a name means."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from weft_server.protocol import AdapterRef
from weft_server.store.base import StoreUnavailable

BASE = "base-model"


def test_the_base_and_the_tenants_adapters_are_listed(start_api: Any) -> None:
    api = start_api()
    api.store_adapter("default", "poet", newest=3)
    api.store_adapter("somebody", "secret")
    models = api.client().models.list().data
    assert [model.id for model in models] == [BASE, "poet"]
    assert models[0].created == 1_700_000_000
    assert (models[1].root, models[1].parent) == ("poet@3", BASE)
    assert models[0].max_model_len == 128


def test_a_name_means_the_newest_version_and_a_number_means_that_one(start_api: Any) -> None:
    api = start_api()
    api.store_adapter("default", "poet", newest=3)
    client = api.client()
    for name in ("poet", "poet@2", BASE):
        answer = client.completions.create(model=name, prompt="x")
        assert answer.model == name
    newest, second, base = (request.adapter for request in api.engine.requests)
    assert newest == AdapterRef("digest-poet-3", "sha256:c", "sha256:w3", 10)
    assert second.digest == "digest-poet-2"
    assert base is None
    assert client.models.retrieve("poet@2").created == 1002


@pytest.mark.parametrize(
    "name", ["poet@4", "poet@0", "poet@03", "poet@", "secret", "poet@x", "default/poet", "poet "]
)
def test_what_does_not_exist_for_this_tenant_is_a_404(start_api: Any, name: str) -> None:
    api = start_api()
    api.store_adapter("default", "poet", newest=3)
    api.store_adapter("somebody", "secret")
    with pytest.raises(openai.NotFoundError) as caught:
        api.client().completions.create(model=name, prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_served_name_with_a_slash_can_be_retrieved(start_api: Any) -> None:
    api = start_api(served_model_name="org/base")
    object.__setattr__(api.services.models, "_base_name", "org/base")
    assert api.http.get("/v1/models/org/base").json()["id"] == "org/base"


def test_an_adapter_is_deleted_through_the_sdk(start_api: Any) -> None:
    api = start_api()
    api.store_adapter("default", "poet")
    deleted = api.client().models.delete("poet")
    assert (deleted.id, deleted.deleted) == ("poet", True)
    assert [model.id for model in api.client().models.list().data] == [BASE]
    with pytest.raises(openai.NotFoundError):
        api.client().models.delete("poet")


def test_neither_the_base_nor_a_single_version_nor_anothers_adapter_can_be_deleted(start_api: Any) -> None:
    api = start_api()
    api.store_adapter("default", "poet", newest=2)
    api.store_adapter("somebody", "secret")
    with pytest.raises(openai.PermissionDeniedError):
        api.client().models.delete(BASE)
    with pytest.raises(openai.BadRequestError, match="all its versions"):
        api.client().models.delete("poet@1")
    with pytest.raises(openai.NotFoundError):
        api.client().models.delete("secret")


def test_a_resolved_adapter_stays_servable_while_the_store_is_away(
    start_api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = start_api()
    api.store_adapter("default", "poet", newest=2)
    api.store_adapter("default", "unused")
    api.client().completions.create(model="poet", prompt="x")

    def away(*arguments: Any) -> None:
        raise StoreUnavailable("the store does not answer", retry_after_s=1)

    monkeypatch.setattr(api.services.records, "get", away)
    api.client().completions.create(model="poet@1", prompt="x")
    assert api.engine.requests[-1].adapter.digest == "digest-poet-1"
    with pytest.raises(openai.InternalServerError) as caught:
        api.client().completions.create(model="unused", prompt="x")
    assert caught.value.status_code == 503
    assert caught.value.code == "store_unavailable"
