"""Wire forms of adapters: Weft's own objects, and vLLM's two."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from weft_server.service.adapter_versions import Adapter, AdapterVersion


class LoadAdapterRequest(BaseModel):
    """vLLM's POST /v1/load_lora_adapter."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool = False
    is_3d_lora_weight: Literal[False] | None = None


class UnloadAdapterRequest(BaseModel):
    """vLLM's POST /v1/unload_lora_adapter; adapters have no integer ids here."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Annotated[str, Field(min_length=1)]
    lora_int_id: None = None


def adapter_object(adapter: Adapter) -> dict[str, Any]:
    """An adapter with its versions, oldest first."""
    return {
        "id": adapter.name,
        "object": "adapter",
        "name": adapter.name,
        "created_at": adapter.created_at,
        "newest": adapter.newest.number,
        "pinned": adapter.pinned,
        "versions": [_version(adapter.name, version) for version in adapter.versions],
    }


def _version(name: str, version: AdapterVersion) -> dict[str, Any]:
    return {
        "id": f"{name}@{version.number}",
        "object": "adapter.version",
        "version": version.number,
        "digest": version.ref.digest,
        "bytes": version.ref.weights_bytes,
        "created_at": version.created_at,
        "max_rank": version.max_rank,
        "target_modules": list(version.target_modules),
        "num_parameters": version.num_parameters,
        "job_id": version.job_id,
    }
