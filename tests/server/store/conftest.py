"""Stores under test: the embedded one, and Redis on a real `redis-server` of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from weft_server.store.opening import Store, open_store

WORKER = Path(__file__).with_name("store_worker.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisProcess:
    """A redis-server on a free port with its files in `directory`; can be killed, frozen and restarted."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.options = options
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        client_options: dict[str, Any] = {"protocol": 2, "retry": Retry(NoBackoff(), 0)}
        self.client: Any = redis.Redis(port=self.port, **client_options)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory),
             "--save", "", "--appendonly", "yes", *self.options],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 20
        while True:
            try:
                self.client.ping()
                return
            except redis.AuthenticationError:
                return
            except (redis.ConnectionError, redis.TimeoutError):
                assert self._process.poll() is None, "redis-server did not start"
                assert time.monotonic() < deadline, "redis-server does not answer"
                time.sleep(0.01)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        self.client.close()
        self.kill()


@pytest.fixture(scope="session")
def redis_binary() -> None:
    if shutil.which("redis-server") is None:
        if os.environ.get("CI"):
            pytest.fail("redis-server is not installed")
        pytest.skip("redis-server is not installed")


@pytest.fixture(scope="session")
def shared_redis(redis_binary: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """One server for all tests that leave it running and as it was."""
    server = RedisProcess(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def start_redis(redis_binary: None, tmp_path: Path) -> Iterator[Callable[..., RedisProcess]]:
    """Start a server with options of its own, stopped after the test."""
    servers: list[RedisProcess] = []

    def start(*options: str) -> RedisProcess:
        if "--cluster-enabled" in options:
            # The default, 10000 above the port, may not exist.
            options = (*options, "--cluster-port", str(free_port()))
        directory = tmp_path / f"redis{len(servers)}"
        directory.mkdir()
        servers.append(RedisProcess(directory, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.signal(signal.SIGCONT)
        server.stop()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def store_url(request: pytest.FixtureRequest) -> str:
    """The `--store` value of each implementation, nothing stored yet."""
    if request.param == "sqlite":
        return "sqlite"
    server: RedisProcess = request.getfixturevalue("shared_redis")
    server.client.flushall()
    return server.url


@pytest.fixture
def store(store_url: str, tmp_path: Path) -> Iterator[Store]:
    with open_store(store_url, tmp_path) as opened:
        yield opened


@pytest.fixture
def damage(store_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """Flip a bit of the byte at an offset below 1 MiB of a stored blob, behind the store's back."""

    def on_disk(blob: str, offset: int) -> None:
        digest = blob.removeprefix("sha256:")
        path = tmp_path / "blobs" / digest[:2] / digest
        content = bytearray(path.read_bytes())
        content[offset] ^= 1
        path.write_bytes(content)

    def in_redis(blob: str, offset: int) -> None:
        client = request.getfixturevalue("shared_redis").client
        key = f"weft:blob:{blob.removeprefix('sha256:')}"
        content = bytearray(client.hget(key, "0"))
        content[offset] ^= 1
        client.hset(key, "0", bytes(content))

    return on_disk if store_url == "sqlite" else in_redis


@pytest.fixture
def start_worker() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Run `store_worker.py` in another process, killed after the test."""
    workers: list[subprocess.Popen[str]] = []

    def start(*args: object) -> subprocess.Popen[str]:
        workers.append(
            subprocess.Popen(
                [sys.executable, WORKER, *map(str, args)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            assert pipe is not None
            pipe.close()
