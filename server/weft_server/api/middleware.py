"""Around every request: its id, a log line, the status metric, and the last resort for unexpected exceptions.

A plain ASGI middleware, so that streaming and disconnects pass through untouched.
"""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weft_server.api.errors import error_response, internal_error
from weft_server.log import current_request_id
from weft_server.metrics import Metrics

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET_PATHS = ("/health", "/ready", "/metrics")

logger = logging.getLogger(__name__)


class RequestMiddleware:
    """Sets `x-request-id` (the caller's, if it is sane) on every response; turns exceptions into a 500.

    Routes find the time of arrival in `request.state.arrived_s`, on the monotonic clock.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
        status: int | None = None
        start_s = time.monotonic()
        scope.setdefault("state", {})["arrived_s"] = start_s

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        token = current_request_id.set(request_id)
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("unexpected error in %s %s", scope["method"], scope["path"])
            if status is None:
                await error_response(internal_error())(scope, receive, send_with_id)
        finally:
            self._report(scope, status, time.monotonic() - start_s)
            current_request_id.reset(token)

    def _report(self, scope: Scope, status: int | None, seconds: float) -> None:
        if status is not None:
            self._metrics.http_response(status)
        level = logging.DEBUG if scope["path"] in _QUIET_PATHS else logging.INFO
        tenant = scope.get("state", {}).get("tenant")
        logger.log(
            level,
            "%s %s status=%s duration_ms=%.1f tenant=%s",
            scope["method"],
            scope["path"],
            status,
            seconds * 1000,
            tenant,
        )
