"""A `redis-server` of the benchmark's own, on a free port of this machine. It ends with the benchmark,
however that ends."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weft_server.bench.adapters.bare_redis import BareRedis
from weft_server.bench.report import BenchError

_START_S = 20.0
_POLL_S = 0.01
_UNTIL_PARENT_ENDS = """trap '' INT
"$@" >/dev/null 2>&1 & server=$!
read -r _
kill "$server" 2>/dev/null
wait "$server"
"""
"""A shell that reads from the benchmark: the end of that pipe is the benchmark's end, were it killed even."""


def why_no_server() -> str | None:
    """Why there is no Redis server to be measured; None if there is."""
    return None if shutil.which("redis-server") else "redis-server is not installed"


@contextmanager
def redis_server(folder: Path) -> Iterator[int]:
    """An empty server that writes no file; yields its port, and ends it.

    Args:
        folder: its working directory.

    Raises:
        BenchError: it does not start.
    """
    port = _free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    process = subprocess.Popen(
        ["sh", "-c", _UNTIL_PARENT_ENDS, "sh", "redis-server", *options, "--appendonly", "no"],
        stdin=subprocess.PIPE,
    )
    try:
        _wait_until_ready(port)
        yield port
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            with BareRedis(port) as client:
                client.command(b"PING")
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise BenchError(f"redis-server does not answer on port {port} ({error})") from error
        time.sleep(_POLL_S)
