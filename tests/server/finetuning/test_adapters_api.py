"""/v1/adapters and vLLM's two routes, over a real socket."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import openai
import pytest

from weft_server.service.adapters import AdapterService
from weft_server.store.base import BlobMissing

CONFIG = json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}).encode()


def _upload(live: Any, name: str | None, weights: bytes = b"weights", config: bytes = CONFIG) -> Any:
    files = {
        "adapter_config.json": ("adapter_config.json", config),
        "adapter_model.safetensors": ("adapter_model.safetensors", weights),
    }
    return live.http.post("/v1/adapters", data={} if name is None else {"name": name}, files=files)


def _error(reply: Any) -> tuple[int, str | None, str]:
    error = reply.json()["error"]
    return reply.status_code, error["param"], error["code"]


def test_an_upload_is_published_and_every_further_one_is_a_new_version(live: Any) -> None:
    first = _upload(live, "pirate", b"one")
    assert first.status_code == 200, first.text
    assert first.json()["newest"] == 1
    second = _upload(live, "pirate", b"two").json()
    assert [version["version"] for version in second["versions"]] == [1, 2]
    assert second["newest"] == 2
    version = second["versions"][1]
    assert (version["max_rank"], version["target_modules"]) == (8, ["q_proj", "v_proj"])
    assert (version["id"], version["job_id"]) == ("pirate@2", None)
    assert version["digest"] != second["versions"][0]["digest"]
    assert live.http.get("/v1/adapters/pirate").json() == second
    assert second in live.http.get("/v1/adapters").json()["data"]
    assert live.client.models.retrieve("pirate@1").id == "pirate@1"
    assert "pirate" in [model.id for model in live.client.models.list()]


def test_a_download_is_the_peft_directory_that_was_uploaded(live: Any, tmp_path: Path) -> None:
    weights = bytes(range(256)) * 2000
    _upload(live, "packed", b"older")
    _upload(live, "packed", weights)
    reply = live.http.get("/v1/adapters/packed/download")
    assert reply.headers["content-type"] == "application/x-tar"
    assert int(reply.headers["content-length"]) == len(reply.content)
    with tarfile.open(fileobj=io.BytesIO(reply.content)) as tar:
        assert tar.getnames() == ["adapter_config.json", "adapter_model.safetensors"]
        for name in tar.getnames():
            (tmp_path / name).write_bytes(tar.extractfile(name).read())
    assert (tmp_path / "adapter_config.json").read_bytes() == CONFIG
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == weights
    older = live.http.get("/v1/adapters/packed/download?version=1").content
    with tarfile.open(fileobj=io.BytesIO(older)) as tar:
        file = tar.extractfile("adapter_model.safetensors")
        assert file is not None
        assert file.read() == b"older"
    assert _error(live.http.get("/v1/adapters/packed/download?version=9"))[0] == 404
    assert _error(live.http.get("/v1/adapters/packed/download?version=0"))[:2] == (422, "version")


def test_version_numbers_are_not_used_again_after_a_delete(live: Any) -> None:
    _upload(live, "phoenix", b"one")
    _upload(live, "phoenix", b"two")
    reply = live.http.delete("/v1/adapters/phoenix")
    assert reply.json() == {"id": "phoenix", "object": "adapter", "deleted": True}
    assert _error(live.http.get("/v1/adapters/phoenix")) == (404, "model", "model_not_found")
    assert _error(live.http.delete("/v1/adapters/phoenix"))[0] == 404
    assert _upload(live, "phoenix", b"three").json()["newest"] == 3
    with pytest.raises(openai.NotFoundError):
        live.client.models.retrieve("phoenix@1")


def test_a_model_can_be_deleted_through_openais_route(live: Any) -> None:
    _upload(live, "tuned")
    assert live.client.models.delete("tuned").deleted
    assert live.http.get("/v1/adapters/tuned").status_code == 404


def test_a_refused_adapter_leaves_nothing_behind(live: Any) -> None:
    reply = _upload(live, "broken", b"garbage")
    assert _error(reply) == (400, None, "invalid_adapter")
    assert live.http.get("/v1/adapters/broken").status_code == 404


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a@1", "ä", "x" * 65])
def test_a_malformed_name_is_a_422(live: Any, name: str) -> None:
    assert _error(_upload(live, name))[:2] == (422, "name")


def test_the_bases_name_is_taken(live: Any) -> None:
    assert _error(_upload(live, live.base))[:2] == (409, "name")


def test_missing_and_unknown_fields_are_422(live: Any) -> None:
    assert _error(_upload(live, None))[:2] == (422, "name")
    reply = live.http.post("/v1/adapters", data={"name": "x"}, files={"adapter_config.json": ("a", CONFIG)})
    assert _error(reply)[:2] == (422, "adapter_model.safetensors")
    reply = live.http.post(
        "/v1/adapters", data={"name": "x", "rank": "8"}, files={"adapter_config.json": ("a", CONFIG)}
    )
    assert _error(reply)[:2] == (422, "rank")


def test_a_config_the_size_of_weights_is_refused(live: Any) -> None:
    big = b" " * ((1 << 20) + 1)
    reply = _upload(live, "bigconfig", config=big, weights=b"")
    assert reply.status_code in (400, 413)


def test_an_upload_over_the_limit_is_413(live: Any) -> None:
    assert _upload(live, "large", b"x" * (2 << 20)).status_code == 413


def test_another_tenants_adapter_is_a_404(live: Any) -> None:
    _upload(live, "secret")
    headers = {"authorization": f"Bearer {live.other.api_key}"}
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/download")):
        reply = live.http.request(method, f"/v1/adapters/secret{path}", headers=headers)
        assert reply.status_code == 404
    assert live.http.get("/v1/adapters", headers=headers).json()["data"] == []
    with pytest.raises(openai.NotFoundError):
        live.other.models.retrieve("secret")
    assert live.http.get("/v1/adapters/secret").status_code == 200


def test_uploads_are_503_with_a_retry_while_the_engine_is_away(live: Any) -> None:
    live.engine.ready = False
    try:
        reply = _upload(live, "later")
    finally:
        live.engine.ready = True
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "2"


# ---------------------------------------------------------------- vLLM's routes


def _directory(live: Any, name: str, tenant: str = "acme", weights: bytes = b"from disk") -> Path:
    folder = Path(live.adapter_root) / tenant / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_bytes(CONFIG)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def _load(live: Any, **body: Any) -> Any:
    return live.http.post("/v1/load_lora_adapter", json=body)


def test_an_adapter_is_loaded_from_the_tenants_folder_and_unloaded(live: Any) -> None:
    folder = _directory(live, "disk/one")
    reply = _load(live, lora_name="disk-one", lora_path="disk/one")
    assert (reply.status_code, reply.text) == (
        200,
        "Success: LoRA adapter 'disk-one' added successfully.",
    )
    assert live.client.models.retrieve("disk-one").id == "disk-one"
    again = _load(live, lora_name="disk-one", lora_path=str(folder))
    assert _error(again) == (400, "lora_name", "adapter_exists")
    assert _load(live, lora_name="disk-one", lora_path=str(folder), load_inplace=True).status_code == 200
    assert live.http.get("/v1/adapters/disk-one").json()["newest"] == 2
    reply = live.http.post("/v1/unload_lora_adapter", json={"lora_name": "disk-one"})
    assert (reply.status_code, reply.text) == (
        200,
        "Success: LoRA adapter 'disk-one' removed successfully.",
    )
    reply = live.http.post("/v1/unload_lora_adapter", json={"lora_name": "disk-one"})
    assert _error(reply)[::2] == (404, "model_not_found")


def test_the_base_cannot_be_unloaded(live: Any) -> None:
    for reply in (
        live.http.post("/v1/unload_lora_adapter", json={"lora_name": "tiny-base"}),
        live.http.delete("/v1/adapters/tiny-base"),
    ):
        assert reply.status_code == 403
        assert "'tiny-base' is the base model" in reply.json()["error"]["message"]


def test_paths_that_lead_out_of_the_tenants_folder_are_refused(live: Any, tmp_path: Path) -> None:
    outside = _directory(live, "theirs", tenant="other")
    (tmp_path / "elsewhere").mkdir()
    home = Path(live.adapter_root) / "acme"
    (home / "link").symlink_to(outside, target_is_directory=True)
    sneaky = home / "sneaky"
    sneaky.mkdir()
    (sneaky / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    (sneaky / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    for path in ("../other/theirs", str(outside), "link", "sneaky", "/etc", ".."):
        reply = _load(live, lora_name="stolen", lora_path=path)
        assert _error(reply)[:2] == (403, "lora_path"), path
    assert live.http.get("/v1/adapters/stolen").status_code == 404


def test_a_directory_without_the_files_is_a_404(live: Any) -> None:
    (Path(live.adapter_root) / "acme" / "empty").mkdir()
    for path in ("nowhere", "empty", "disk\x00"):
        assert _error(_load(live, lora_name="ghost", lora_path=path))[:2] == (404, "lora_path")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_path": "x"}, "lora_name"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": "x", "lora_path": "y", "pin": True}, "pin"),
        ({"lora_name": "x", "lora_path": "y", "is_3d_lora_weight": True}, "is_3d_lora_weight"),
        ({"lora_name": "a b", "lora_path": "y"}, "lora_name"),
    ],
)
def test_bad_load_requests_are_422(live: Any, body: dict[str, Any], param: str) -> None:
    assert _error(live.http.post("/v1/load_lora_adapter", json=body))[:2] == (422, param)


# ---------------------------------------------------------------- the service


def test_without_an_adapter_root_nothing_is_loaded_from_disk(kit: Any) -> None:
    adapters: AdapterService = kit.server().adapters
    with pytest.raises(Exception, match="--adapter-root") as caught:
        kit.run(adapters.load("acme", "x", "y"))
    assert caught.value.status == 403


@pytest.mark.parametrize("tenant", [".", ".."])
def test_a_tenant_named_like_a_parent_folder_reads_nothing(kit: Any, tmp_path: Path, tenant: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "adapter_config.json").write_bytes(CONFIG)
    adapters: AdapterService = kit.server(adapter_root=tmp_path / "root").adapters
    with pytest.raises(Exception, match="cannot be a folder") as caught:
        kit.run(adapters.load(tenant, "x", "."))
    assert caught.value.status == 403


def test_a_deleted_adapters_bytes_stay_for_requests_in_flight_and_then_go(kit: Any) -> None:
    server = kit.server()
    clock = _Clock(kit.store.records)
    patient = kit.server(records=clock)

    async def scenario() -> tuple[str, str]:
        adapter = await server.adapters.upload("acme", "a", io.BytesIO(CONFIG), io.BytesIO(b"weights"))
        await server.adapters.delete("acme", "a")
        await patient.adapters.sweep_retired()
        return adapter.newest.blobs

    blobs = kit.run(scenario())
    assert [kit.store.blobs.size(blob) for blob in blobs] == [len(CONFIG), 7]
    clock.offset_s = 3601.0
    kit.run(patient.adapters.sweep_retired())
    for blob in blobs:
        with pytest.raises(BlobMissing):
            kit.store.blobs.size(blob)


class _Clock:
    """A record store whose clock can be set forward."""

    def __init__(self, records: Any) -> None:
        self._records = records
        self.offset_s = 0.0

    def now(self) -> float:
        return float(self._records.now()) + self.offset_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._records, name)


def test_uploads_of_one_name_at_once_all_become_versions(kit: Any) -> None:
    server = kit.server()

    async def scenario() -> Any:
        await asyncio.gather(
            *(
                server.adapters.upload("acme", "a", io.BytesIO(CONFIG), io.BytesIO(b"%d" % idx))
                for idx in range(8)
            )
        )
        return await server.adapters.get("acme", "a")

    adapter = kit.run(scenario())
    assert [version.number for version in adapter.versions] == list(range(1, 9))
    assert adapter.newest.number == 8
    assert len({version.ref.weights_blob for version in adapter.versions}) == 8
