"""/v1/fine_tuning/jobs: OpenAI's wire format around the job service."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from weft_server.api.dependencies import AppServices, CallerTenant
from weft_server.api.openapi import json_body
from weft_server.api.queries import only_query
from weft_server.api.schemas_jobs import JobBody, event_object, job_object, read_new_job
from weft_server.api.streaming import json_response
from weft_server.errors import InvalidRequest
from weft_server.service.jobs import NewJob

router = APIRouter(tags=["openai"])

MAX_LIMIT = 1000
_METADATA_FILTER = re.compile(r"metadata\[(?P<key>.{1,64})\]")

_Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT)]


@router.post("/v1/fine_tuning/jobs", openapi_extra=json_body(JobBody))
async def create_job(
    services: AppServices, tenant: CallerTenant, body: Annotated[NewJob, Depends(read_new_job)]
) -> Response:
    """Submit a finetune job; its file is read afterwards."""
    return json_response(job_object(await services.jobs.create(tenant.name, body)))


def _is_metadata_filter(name: str) -> bool:
    return _METADATA_FILTER.fullmatch(name) is not None


@router.get(
    "/v1/fine_tuning/jobs",
    dependencies=[only_query("after", "limit", "metadata", is_also=_is_metadata_filter)],
)
async def list_jobs(
    request: Request,
    services: AppServices,
    tenant: CallerTenant,
    after: str | None = None,
    limit: _Limit = 20,
) -> Response:
    """The tenant's jobs, newest first; `metadata[k]=v` filters, `metadata=null` means those without."""
    pairs = {
        match["key"]: value
        for name, value in request.query_params.items()
        if (match := _METADATA_FILTER.fullmatch(name)) is not None
    }
    plain = request.query_params.get("metadata")
    if plain is not None and (plain != "null" or pairs):
        raise InvalidRequest(
            f"metadata is '{plain}'; it must be null and stand alone, or be written metadata[key]=value.",
            param="metadata",
        )
    page = await services.jobs.list(
        tenant.name, after=after, limit=limit, metadata=pairs, without_metadata=plain is not None
    )
    return _list([job_object(job) for job in page.items], page.has_more)


@router.get("/v1/fine_tuning/jobs/{job_id}", dependencies=[only_query()])
async def get_job(job_id: str, services: AppServices, tenant: CallerTenant) -> Response:
    """One job."""
    return json_response(job_object(await services.jobs.get(tenant.name, job_id)))


@router.get("/v1/fine_tuning/jobs/{job_id}/events", dependencies=[only_query("after", "limit")])
async def list_events(
    job_id: str,
    services: AppServices,
    tenant: CallerTenant,
    after: str | None = None,
    limit: _Limit = 20,
) -> Response:
    """A job's events, newest first."""
    page = await services.jobs.events(tenant.name, job_id, after=after, limit=limit)
    return _list([event_object(event) for event in page.items], page.has_more)


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, services: AppServices, tenant: CallerTenant) -> Response:
    """Cancel an unfinished job."""
    return json_response(job_object(await services.jobs.cancel(tenant.name, job_id)))


def _list(data: list[dict[str, Any]], has_more: bool) -> Response:
    return json_response({"object": "list", "data": data, "has_more": has_more})
