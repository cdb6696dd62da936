"""The least that can ask a Redis server something: one socket, answers into a buffer. For ceilings, and on
machines without the `redis` package.

Protocol: RESP2 (redis.io/docs/latest/develop/reference/protocol-spec).
"""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Self

from weft_server.bench.report import BenchError

_TIMEOUT_S = 30.0


class BareRedis:
    """One connection. A context manager that closes it.

    Raises:
        OSError: nothing listens there.
    """

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def command(self, *words: bytes) -> bytes:
        """Send one command; returns its answer's first line, without the line's end.

        Raises:
            BenchError: the server answers with an error, or ends the connection.
        """
        head = b"*%d\r\n" % len(words)
        self._socket.sendall(head + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words))
        line = bytearray()
        while not line.endswith(b"\r\n"):
            byte = self._socket.recv(1)
            if not byte:
                raise BenchError("redis-server has closed the connection")
            line += byte
        answer = bytes(line[:-2])
        if answer.startswith(b"-"):
            raise BenchError(f"redis-server answers {answer[1:].decode(errors='replace')!r}")
        return answer

    def get_into(self, key: bytes, buffer: memoryview) -> None:
        """The value of a key into a buffer of its size.

        Raises:
            BenchError: the value is absent or has another size.
        """
        answer = self.command(b"GET", key)
        if answer != b"$%d" % len(buffer):
            raise BenchError(f"redis-server answers {answer!r} instead of {len(buffer)} bytes")
        self._fill(buffer)
        self._fill(memoryview(bytearray(2)))

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            num_received = self._socket.recv_into(buffer[done:])
            if not num_received:
                raise BenchError("redis-server has closed the connection")
            done += num_received
