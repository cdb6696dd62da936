"""/v1/files: OpenAI's wire format around the file service."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from weft_server.api.dependencies import AppServices, CallerTenant
from weft_server.api.openapi import form_body
from weft_server.api.queries import only_query
from weft_server.api.schemas_files import file_object
from weft_server.api.streaming import json_response
from weft_server.api.uploads import read_form
from weft_server.service.files import check_purpose

router = APIRouter(tags=["openai"])

BYTES_PER_MB = 1 << 20


@router.post("/v1/files", openapi_extra=form_body(texts=("purpose",), files=("file",)))
async def create_file(request: Request, services: AppServices, tenant: CallerTenant) -> Response:
    """Upload a training file."""
    max_bytes = services.settings.max_upload_mb * BYTES_PER_MB
    async with read_form(
        request,
        texts=("purpose",),
        files=("file",),
        folder=services.settings.upload_dir,
        max_bytes=max_bytes,
        is_openai=True,
        unsupported=("expires_after",),
    ) as form:
        purpose = form.texts["purpose"]
        check_purpose(purpose)
        upload = form.files["file"]
        file = await services.files.upload(
            tenant.name, filename=upload.filename or "file", purpose=purpose, content=upload.file
        )
    return json_response(file_object(file))


@router.get("/v1/files", dependencies=[only_query("after", "limit", "order", "purpose")])
async def list_files(
    services: AppServices,
    tenant: CallerTenant,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> Response:
    """The tenant's files."""
    page = await services.files.list(
        tenant.name, after=after, limit=limit, newest_first=order == "desc", purpose=purpose
    )
    data = [file_object(file) for file in page.items]
    return json_response(
        {
            "object": "list",
            "data": data,
            "has_more": page.has_more,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
        }
    )


@router.get("/v1/files/{file_id}", dependencies=[only_query()])
async def get_file(file_id: str, services: AppServices, tenant: CallerTenant) -> Response:
    """One file's description."""
    return json_response(file_object(await services.files.get(tenant.name, file_id)))


@router.get("/v1/files/{file_id}/content", dependencies=[only_query()])
async def get_file_content(file_id: str, services: AppServices, tenant: CallerTenant) -> Response:
    """One file's bytes."""
    file, chunks = await services.files.content(tenant.name, file_id)
    return StreamingResponse(
        chunks,
        media_type="application/octet-stream",
        headers={
            "content-length": str(file.num_bytes),
            "content-disposition": attachment(file.filename),
        },
    )


@router.delete("/v1/files/{file_id}", dependencies=[only_query()])
async def delete_file(file_id: str, services: AppServices, tenant: CallerTenant) -> Response:
    """Delete a file; unfinished jobs that read it go on."""
    await services.files.delete(tenant.name, file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})


def attachment(filename: str) -> str:
    """A `content-disposition` for any filename (RFC 6266)."""
    return f"attachment; filename*=UTF-8''{quote(filename, safe='')}"
