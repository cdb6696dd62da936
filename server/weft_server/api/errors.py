"""Errors as HTTP: OpenAI's body and the retry headers, for every failure that a response can report.

Knows the error hierarchy and HTTP; the messages are written where the errors are raised.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from weft_server.api.bodies import field_path
from weft_server.errors import (
    Conflict,
    DeadlineExceeded,
    EngineCrashed,
    Internal,
    InvalidRequest,
    NotFound,
    Unauthenticated,
    Unavailable,
    Unprocessable,
    WeftError,
)

DEFAULT_RETRY_AFTER_S = 1.0


def error_body(error: WeftError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_headers(error: WeftError) -> dict[str, str]:
    """Whether and when a client may try again (seconds, rounded up), and how to authenticate."""
    headers: dict[str, str] = {}
    retry_after_s = error.retry_after_s
    if retry_after_s is None and error.status in (429, 503):
        retry_after_s = DEFAULT_RETRY_AFTER_S
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, -int(-retry_after_s // 1)))
    if isinstance(error, DeadlineExceeded | Conflict | EngineCrashed):
        # Without this, OpenAI's SDK would try them again.
        headers["x-should-retry"] = "false"
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return headers


def error_response(error: WeftError) -> JSONResponse:
    """The JSON response of an error."""
    return JSONResponse(error_body(error), status_code=error.status, headers=error_headers(error))


def internal_error() -> Internal:
    """What a client learns of an unexpected exception: nothing but that it was logged."""
    return Internal("Internal server error. The log has the details under this response's x-request-id.")


def install_error_handlers(app: FastAPI) -> None:
    """Give every failure that FastAPI routes raise, its own 404 and 405 included, OpenAI's shape.

    Unexpected exceptions are the outermost middleware's (`api/middleware.py`).
    """
    app.add_exception_handler(WeftError, _weft_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _validation_error)


async def _weft_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, WeftError)
    return error_response(error)


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own errors: no such route, wrong method, malformed multipart."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    mapped: WeftError
    if error.status_code == 404:
        mapped = NotFound(f"No such route: {where}.", code="unknown_url")
    elif error.status_code == 405:
        mapped = InvalidRequest(f"Method not allowed: {where}.", code="method_not_allowed")
    elif error.status_code == 503:
        mapped = Unavailable(str(error.detail))
    else:
        mapped = InvalidRequest(str(error.detail))
    return JSONResponse(
        error_body(mapped),
        status_code=error.status_code,
        headers={**error_headers(mapped), **(error.headers or {})},
    )


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    """Query, path and form fields that FastAPI parsed: 422 on routes tagged `weft`, else 400."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    location = tuple(first["loc"])
    if location and location[0] in ("body", "query", "path", "header"):
        location = location[1:]
    param = field_path(location) or None
    if first["type"] == "missing":
        message, code = f"Missing required parameter: '{param}'.", "missing_required_parameter"
    else:
        message, code = f"Invalid value for '{param}': {first['msg']}.", "invalid_value"
    route = request.scope.get("route")
    if "weft" in (getattr(route, "tags", None) or ()):
        return error_response(Unprocessable(message, param=param))
    return error_response(InvalidRequest(message, param=param, code=code))
