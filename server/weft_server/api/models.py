"""/v1/models: the base and the tenant's adapters; deleting an adapter through OpenAI's route."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from weft_server.api.dependencies import AppServices, CallerTenant
from weft_server.api.streaming import json_response
from weft_server.errors import Forbidden, InvalidRequest
from weft_server.protocol import EngineReady
from weft_server.service.models import ModelCard

router = APIRouter(tags=["openai"])


@router.get("/v1/models")
async def list_models(services: AppServices, tenant: CallerTenant) -> Response:
    """Every name that `model` may have for this tenant."""
    cards = await services.models.list(tenant.name)
    return json_response({"object": "list", "data": [_model(card, services.engine.info) for card in cards]})


@router.get("/v1/models/{model:path}")
async def get_model(model: str, services: AppServices, tenant: CallerTenant) -> Response:
    """One model: the base, `name`, or `name@3`."""
    card = await services.models.get(tenant.name, model)
    return json_response(_model(card, services.engine.info))


@router.delete("/v1/models/{model:path}")
async def delete_model(model: str, services: AppServices, tenant: CallerTenant) -> Response:
    """Delete an adapter with all its versions; requests in flight finish on what they started with."""
    if model == services.models.base_name:
        raise Forbidden(f"'{model}' is the base model and cannot be deleted.", param="model")
    if "@" in model:
        raise InvalidRequest(
            f"'{model}' names one version. An adapter is deleted with all its versions: DELETE "
            f"/v1/models/{model.partition('@')[0]}.",
            param="model",
        )
    await services.models.get(tenant.name, model)
    await services.adapters.delete(tenant.name, model)
    return json_response({"id": model, "object": "model", "deleted": True})


def _model(card: ModelCard, info: EngineReady | None) -> dict[str, Any]:
    """OpenAI's fields, and vLLM's `root`, `parent` and `max_model_len`."""
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": card.owned_by,
        "root": card.root,
        "parent": card.parent,
        "max_model_len": None if info is None else info.max_model_len,
    }
