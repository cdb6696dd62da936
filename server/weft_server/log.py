"""Logging: one line per event on standard error, with the id of the request it belongs to.

    2026-01-31T12:00:00.123Z INFO weft_server.service.tenants reloaded API keys: 3 tenants, 4 keys
    request_id=req_…

Owns the format and the request id of the current task; decides nothing about what is logged.
"""

from __future__ import annotations

import logging
import sys
import time
from contextvars import ContextVar
from typing import TextIO

current_request_id: ContextVar[str | None] = ContextVar("weft_request_id", default=None)
"""Set by the API for the time it serves a request; tasks started meanwhile inherit it."""


class OneLineFormatter(logging.Formatter):
    """Formats a record, traceback included, as a single line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time in UTC with milliseconds, level, logger, message, request id; line breaks become ` | `."""
        created = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = f"{created}.{int(record.msecs):03d}Z {record.levelname} {record.name} {record.getMessage()}"
        request_id = current_request_id.get()
        if request_id is not None:
            line += f" request_id={request_id}"
        if record.exc_info:
            line += " exception=" + self.formatException(record.exc_info)
        return " | ".join(part.strip() for part in line.splitlines() if part.strip())


def configure_logging(level: str, stream: TextIO | None = None) -> None:
    """Send Weft's and uvicorn's logs of at least `level` (`debug` … `error`) to standard error."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(OneLineFormatter())
    for name in ("weft_server", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
    for name in ("uvicorn.error", "uvicorn.access"):
        child = logging.getLogger(name)
        child.handlers = []
        child.propagate = True
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
