"""Streamed requests over HTTP/1.1, as cheaply as Python allows: the client shares the server's machine.

A pool of connections that are kept; responses are parsed by httptools, and of an event no more is looked at
than whether it carries text, counts or an error. A general client (httpx) costs several times as much per
event, which on a busy machine would be measured as the server's latency.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httptools

from weft_server.errors import ConfigError


@dataclass(slots=True)
class Reply:
    """What came back for one request; times are seconds of `time.perf_counter`.

    `pieces_s` are the times of the events that carried text or tokens; `num_tokens` is the server's count.
    `error` is None, an HTTP status with its code, or what happened to the connection.
    """

    sent_s: float = 0.0
    ended_s: float = 0.0
    pieces_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None


class Client:
    """Connections to one server."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """`url` is the server's root; a request may take `timeout_s` in all.

        Raises:
            ConfigError: not an http or https address.
        """
        self._address: SplitResult = urlsplit(url)
        if self._address.scheme not in ("http", "https") or not self._address.hostname:
            raise ConfigError(f"--url is {url!r}; give the server's address, as http://127.0.0.1:8000")
        self._timeout_s = timeout_s
        self._idle: deque[_Connection] = deque()

    async def stream(self, path: str, body: bytes, key: str | None) -> Reply:
        """POST a body and read the stream to its end. Never raises: what fails is in the reply."""
        reply = Reply(sent_s=time.perf_counter())
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connection()
                reply.sent_s = time.perf_counter()
                await connection.post(path, self._address.netloc, body, key, reply)
        except TimeoutError:
            reply.error = "client timeout"
        except OSError as error:
            reply.error = f"connection: {type(error).__name__}"
        if connection is not None and connection.is_reusable:
            self._idle.append(connection)
        elif connection is not None:
            connection.close()
        reply.ended_s = time.perf_counter()
        return reply

    async def close(self) -> None:
        """Close all connections."""
        while self._idle:
            self._idle.popleft().close()
        # Transports close in the loop's next round.
        await asyncio.sleep(0)

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection
        host, is_tls = self._address.hostname or "", self._address.scheme == "https"
        context = ssl.create_default_context() if is_tls else None
        port = self._address.port or (443 if is_tls else 80)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, host, port, ssl=context)
        return connection


class _Connection(asyncio.Protocol):
    """One connection; carries one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._reply = Reply()
        self._done: asyncio.Future[None] | None = None
        self._rest = b""
        self.is_reusable = False

    async def post(self, path: str, host: str, body: bytes, key: str | None, reply: Reply) -> None:
        """Send a request and wait for the end of its response.

        Raises:
            ConnectionError: the connection ended first.
        """
        if self._transport is None:
            raise ConnectionResetError("the connection is closed")
        self._reply, self._rest, self.is_reusable = reply, b"", False
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        authorization = f"Authorization: Bearer {key}\r\n" if key else ""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"{authorization}Content-Length: {len(body)}\r\n\r\n"
        )
        self._transport.write(head.encode() + body)
        try:
            await self._done
        finally:
            self._done = None

    def close(self) -> None:
        """Close it."""
        if self._transport is not None:
            self._transport.close()

    # ------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.is_reusable = True

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._end(ConnectionAbortedError("the response is not HTTP"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._transport, self.is_reusable = None, False
        self._end(ConnectionResetError("the server closed the connection") if exc is None else exc)

    # ------------------------------------------------------------ httptools

    def on_body(self, data: bytes) -> None:
        """A part of the body: whole events, and perhaps the beginning of one."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        now_s = time.perf_counter()
        for line in lines:
            if line.startswith(b"data: {"):
                self._event(line, now_s)

    def on_message_complete(self) -> None:
        """The response has ended."""
        status = self._parser.get_status_code()
        if status != 200:
            self._reply.error = f"{status} {_code(self._rest)}"
        self.is_reusable = bool(self._parser.should_keep_alive()) and self._transport is not None
        self._end(None)

    def _event(self, line: bytes, now_s: float) -> None:
        if b'"choices":[]' in line:
            usage = json.loads(line[6:]).get("usage") or {}
            self._reply.num_tokens = usage.get("completion_tokens", 0)
        elif line.startswith(b'data: {"error"'):
            self._reply.error = f"stream {_code(line[6:])}"
        else:
            self._reply.pieces_s.append(now_s)

    def _end(self, error: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


def _code(body: bytes) -> str:
    """The code of an error body."""
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "without a code"
