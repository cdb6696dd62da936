"""Request bodies in `/openapi.json`, for `/docs` and generated clients.

Bodies are read by Weft's own code, which FastAPI cannot look into, so that errors are OpenAI's; here routes
say what they read. Descriptions only: nothing is validated by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

_DEFINITION = "#/$defs/"


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads a JSON object of this form (one that does not contain itself)."""
    schema = model.model_json_schema()
    return _body("application/json", _inlined(schema, schema.pop("$defs", {})))


def form_body(*, texts: Sequence[str], files: Sequence[str]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads a multipart form of exactly these fields."""
    properties: dict[str, Any] = {name: {"type": "string"} for name in texts}
    properties |= {name: {"type": "string", "format": "binary"} for name in files}
    schema = {"type": "object", "properties": properties, "required": [*texts, *files]}
    return _body("multipart/form-data", {**schema, "additionalProperties": False})


def _body(media_type: str, schema: Any) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """The schema without references: pydantic's lead to a place that a part of a document does not have."""
    if isinstance(schema, list):
        return [_inlined(entry, definitions) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].removeprefix(_DEFINITION)], definitions)
    return {key: _inlined(entry, definitions) for key, entry in schema.items()}
