"""/health, /ready and /metrics: what operators and orchestrators ask."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from weft_server.api.dependencies import AdminTenant, AppServices
from weft_server.api.streaming import json_response
from weft_server.errors import Unavailable
from weft_server.metrics import METRICS_CONTENT_TYPE

router = APIRouter(tags=["operations"])

_RETRY_AFTER_S = 2.0


@router.get("/health")
async def health() -> Response:
    """Whether this process answers. No key needed."""
    return json_response({"status": "ok"})


@router.get("/ready")
async def ready(services: AppServices) -> Response:
    """Whether generations can be served now; else 503, saying why. No key needed."""
    if not services.engine.ready:
        why = services.engine.why_not_ready or "The engine is not ready."
        raise Unavailable(why, code="engine_not_ready", retry_after_s=_RETRY_AFTER_S)
    info = services.engine.info
    return json_response(
        {
            "status": "ready",
            "model": services.models.base_name,
            "max_model_len": None if info is None else info.max_model_len,
            "device": None if info is None else info.device,
            "dtype": None if info is None else info.dtype,
            "quantization": None if info is None else info.quantization,
        }
    )


@router.get("/metrics")
async def metrics(services: AppServices, _admin: AdminTenant) -> Response:
    """Prometheus' text format; needs an admin key when keys are configured."""
    return Response(services.metrics.render(), headers={"content-type": METRICS_CONTENT_TYPE})
