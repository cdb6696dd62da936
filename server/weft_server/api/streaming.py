"""Answers that end early when the client goes: server-sent events, and waiting for a whole answer.

Knows ASGI and the event-stream format; knows nothing of what is streamed. A client that disconnects cancels
the work, whose own cleanup aborts it in the engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from weft_server.api.errors import error_body, internal_error
from weft_server.errors import WeftError

T = TypeVar("T")

DONE_EVENT = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"
_CLIENT_CLOSED_REQUEST = 499

logger = logging.getLogger(__name__)


class ClientDisconnectedError(Exception):
    """The client is gone; nobody will read a response."""


def event(data: object) -> bytes:
    """One server-sent event holding JSON."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def json_response(data: object) -> Response:
    """A 200 with JSON, written by msgspec (one fast pass, no ASCII escapes)."""
    return Response(msgspec.json.encode(data), media_type="application/json")


def client_closed_response() -> Response:
    """For the log: 499, as nginx counts requests whose client did not wait."""
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, cancelling it when the client disconnects. The request's body must have been read.

    Raises:
        ClientDisconnectedError: the client went first; `work` has been cancelled and has cleaned up.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError
        return task.result()
    finally:
        await _cancel(task, gone)


async def event_stream(
    request: Request,
    events: AsyncGenerator[bytes, None],
    *,
    on_begin: Callable[[], None],
    patience_s: float = 10.0,
    keep_alive_s: float = 15.0,
) -> Response:
    """A response that streams `events`, ended by `[DONE]`.

    The first event is awaited for up to `patience_s`, so that what fails before it fails with its own HTTP
    status. A later failure is an event `{"error": …}`. Silence is bridged by a comment every `keep_alive_s`.
    `on_begin` is called when that patience ends and the 200 is about to be sent.

    Raises:
        WeftError: raised by `events` before the first event, within `patience_s`.
        ClientDisconnectedError: the client went meanwhile.
    """
    first = asyncio.ensure_future(anext(events, None))
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({first, gone}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        if first.done():
            first.result()
        elif gone.done():
            raise ClientDisconnectedError
    except BaseException:
        await _cancel(first, gone)
        await events.aclose()
        raise
    on_begin()
    return _EventStream(events, first, gone, keep_alive_s)


class _EventStream(Response):
    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        first: asyncio.Future[bytes | None],
        gone: asyncio.Task[None],
        keep_alive_s: float,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._first = first
        self._gone = gone
        self._keep_alive_s = keep_alive_s
        self._num_sent = 0

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        pump: asyncio.Task[None] | None = None
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            pump = asyncio.create_task(self._pump(send))
            num_seen = 0
            while not (pump.done() or self._gone.done()):
                await asyncio.wait(
                    {pump, self._gone}, timeout=self._keep_alive_s, return_when=asyncio.FIRST_COMPLETED
                )
                if num_seen == self._num_sent and not pump.done():
                    await send({"type": "http.response.body", "body": _KEEP_ALIVE, "more_body": True})
                num_seen = self._num_sent
            if pump.done():
                pump.result()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await _cancel(*(task for task in (pump, self._first, self._gone) if task is not None))
            await self._events.aclose()

    async def _pump(self, send: Send) -> None:
        """Send every event, then `[DONE]`; a failure becomes the last event."""
        try:
            chunk = await self._first
            while chunk is not None:
                await self._send(send, chunk)
                chunk = await anext(self._events, None)
        except WeftError as error:
            await self._send(send, event(error_body(error)))
        except Exception:
            logger.exception("unexpected error in a stream")
            await self._send(send, event(error_body(internal_error())))
        await self._send(send, DONE_EVENT)

    async def _send(self, send: Send, chunk: bytes) -> None:
        self._num_sent += 1
        await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
