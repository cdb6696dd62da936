"""JSON bodies: bounded reading, strict parsing, and errors that name the offending field.

Knows bytes, JSON and pydantic's error list; knows nothing of any particular resource.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import msgspec
from fastapi import Request
from pydantic import BaseModel, ValidationError

from weft_server.errors import InvalidRequest, TooLarge, Unprocessable, WeftError

MAX_JSON_BYTES = 16 * 1024 * 1024

NeutralValues: TypeAlias = Mapping[str, Callable[[Any], bool]]
"""Field name → whether a value of it changes nothing and may be ignored. `null` always may."""


async def read_json_object(request: Request) -> dict[str, Any]:
    """The request's body as a JSON object.

    Raises:
        InvalidRequest: not UTF-8 JSON, or not an object.
        TooLarge: more than 16 MiB.
    """
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > MAX_JSON_BYTES:
            raise TooLarge(f"The JSON body is larger than {MAX_JSON_BYTES} bytes.")
        chunks.append(chunk)
    try:
        body = msgspec.json.decode(b"".join(chunks))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {_json_type(body)}.", code="invalid_type")
    return body


def strip_unsupported(
    body: Mapping[str, Any], model: type[BaseModel], neutral: NeutralValues
) -> dict[str, Any]:
    """Drop the fields that Weft does not implement but whose value changes nothing.

    Raises:
        InvalidRequest: `unsupported_parameter` for a known field with another value, `unknown_parameter` for
            a field that neither `model` nor `neutral` has.
    """
    kept: dict[str, Any] = {}
    for name, value in body.items():
        if name in model.model_fields:
            kept[name] = value
        elif name not in neutral:
            raise InvalidRequest(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
        elif value is not None and not neutral[name](value):
            raise InvalidRequest(
                f"Unsupported parameter: '{name}' = {_shorten(value)} would change the result, and Weft does "
                "not implement it. Leave it out.",
                param=name,
                code="unsupported_parameter",
            )
    return kept


def invalid_body(error: ValidationError, *, status: int, prefix: tuple[str | int, ...] = ()) -> WeftError:
    """Turn pydantic's first complaint into a 400 or 422 that names field, value and expectation."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = field_path((*prefix, *first["loc"]))
    kind = first["type"]
    if kind == "missing":
        message, code = f"Missing required parameter: '{param}'.", "missing_required_parameter"
    elif kind == "extra_forbidden":
        message, code = f"Unknown parameter: '{param}'.", "unknown_parameter"
    else:
        expectation = first["msg"].removeprefix("Value error, ")
        message = f"Invalid value for '{param}': {_shorten(first['input'])}. {expectation}."
        code = "invalid_type" if kind.endswith("_type") else "invalid_value"
        if kind == "unsupported_parameter":
            code = kind
    if status == 422:
        return Unprocessable(message, param=param)
    return InvalidRequest(message, param=param, code=code)


def field_path(location: tuple[str | int, ...]) -> str:
    """`("messages", 0, "content")` → `messages[0].content`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path


def _shorten(value: object, max_chars: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= max_chars else text[:max_chars] + "…"


def _json_type(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
