"""/v1/adapters, and vLLM's /v1/load_lora_adapter and /v1/unload_lora_adapter."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse

from weft_server.api.dependencies import AppServices, CallerTenant, weft_body
from weft_server.api.files import BYTES_PER_MB, attachment
from weft_server.api.openapi import form_body, json_body
from weft_server.api.queries import only_query
from weft_server.api.schemas_adapters import LoadAdapterRequest, UnloadAdapterRequest, adapter_object
from weft_server.api.streaming import json_response
from weft_server.api.uploads import read_form
from weft_server.service.adapters import CONFIG_FILE, WEIGHTS_FILE

router = APIRouter(tags=["weft"])


@router.post("/v1/adapters", openapi_extra=form_body(texts=("name",), files=(CONFIG_FILE, WEIGHTS_FILE)))
async def create_adapter(request: Request, services: AppServices, tenant: CallerTenant) -> Response:
    """Upload a PEFT adapter; a name that exists gets a new version."""
    max_bytes = services.settings.max_upload_mb * BYTES_PER_MB
    async with read_form(
        request,
        texts=("name",),
        files=(CONFIG_FILE, WEIGHTS_FILE),
        folder=services.settings.upload_dir,
        max_bytes=max_bytes,
        is_openai=False,
    ) as form:
        adapter = await services.adapters.upload(
            tenant.name, form.texts["name"], form.files[CONFIG_FILE].file, form.files[WEIGHTS_FILE].file
        )
    return json_response(adapter_object(adapter))


@router.get("/v1/adapters", dependencies=[only_query()])
async def list_adapters(services: AppServices, tenant: CallerTenant) -> Response:
    """The tenant's adapters, newest name first."""
    adapters = await services.adapters.list(tenant.name)
    return json_response({"object": "list", "data": [adapter_object(adapter) for adapter in adapters]})


@router.get("/v1/adapters/{name}", dependencies=[only_query()])
async def get_adapter(name: str, services: AppServices, tenant: CallerTenant) -> Response:
    """One adapter with its versions."""
    return json_response(adapter_object(await services.adapters.get(tenant.name, name)))


@router.delete("/v1/adapters/{name}", dependencies=[only_query()])
async def delete_adapter(name: str, services: AppServices, tenant: CallerTenant) -> Response:
    """Delete an adapter with all its versions; requests in flight finish on what they started with."""
    await services.adapters.delete(tenant.name, name)
    return json_response({"id": name, "object": "adapter", "deleted": True})


@router.get("/v1/adapters/{name}/download", dependencies=[only_query("version")])
async def download_adapter(
    name: str,
    services: AppServices,
    tenant: CallerTenant,
    version: Annotated[int | None, Query(ge=1)] = None,
) -> Response:
    """A version (the newest unless given) as a tar of its PEFT directory."""
    download = await services.adapters.download(tenant.name, name, version)
    return StreamingResponse(
        download.chunks,
        media_type="application/x-tar",
        headers={
            "content-length": str(download.num_bytes),
            "content-disposition": attachment(download.filename),
        },
    )


@router.post("/v1/adapters/{name}/pin", dependencies=[only_query()])
async def pin_adapter(name: str, services: AppServices, tenant: CallerTenant) -> Response:
    """Keep the newest version of an adapter on the device, now and after every new one."""
    return json_response(adapter_object(await services.adapters.pins.pin(tenant.name, name)))


@router.post("/v1/adapters/{name}/unpin", dependencies=[only_query()])
async def unpin_adapter(name: str, services: AppServices, tenant: CallerTenant) -> Response:
    """Let an adapter leave the device like any other."""
    return json_response(adapter_object(await services.adapters.pins.unpin(tenant.name, name)))


@router.post("/v1/load_lora_adapter", openapi_extra=json_body(LoadAdapterRequest))
async def load_lora_adapter(
    services: AppServices,
    tenant: CallerTenant,
    body: Annotated[LoadAdapterRequest, Depends(weft_body(LoadAdapterRequest))],
) -> Response:
    """Publish an adapter from the tenant's folder below --adapter-root."""
    await services.adapters.load(
        tenant.name, body.lora_name, body.lora_path, replace_existing=body.load_inplace
    )
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", openapi_extra=json_body(UnloadAdapterRequest))
async def unload_lora_adapter(
    services: AppServices,
    tenant: CallerTenant,
    body: Annotated[UnloadAdapterRequest, Depends(weft_body(UnloadAdapterRequest))],
) -> Response:
    """Delete an adapter with all its versions."""
    await services.adapters.delete(tenant.name, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
