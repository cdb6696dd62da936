"""`weft bench adapters` from end to end on a tiny shape, with a real redis-server, and what it says of what
is not there. Times are measured here but never judged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from weft_server import cli
from weft_server.bench.adapters import page_cache, redis_process, sources
from weft_server.bench.adapters.sources import DISK_COLD, DISK_WARM, HOST_CACHE, REDIS


@pytest.fixture
def redis_binary() -> None:
    if shutil.which("redis-server") is None:
        if os.environ.get("CI"):
            pytest.fail("redis-server is not installed")
        pytest.skip("redis-server is not installed")


def measured(tmp_path: Path) -> dict[str, Any]:
    store, out = tmp_path / "disk", tmp_path / "out"
    store.mkdir()
    flags = ["--model", "tiny", "--budget-s", "0", "--device", "cpu", "--adapter-rank", "4"]
    assert cli.main(["bench", "adapters", *flags, "--store-dir", str(store), "--out", str(out)]) == 0
    assert list(store.iterdir()) == []
    content: dict[str, Any] = json.loads((out / "adapters-tiny-cpu.json").read_text())
    return content


def loads_of(content: dict[str, Any]) -> dict[str, list[Any]]:
    table = next(table for table in content["tables"] if table["title"] == "Until an adapter can be used")
    return {row[0]: row for row in table["rows"]}


@pytest.mark.redis
def test_redis_is_measured_by_the_very_adapter_that_arrives(redis_binary: None, tmp_path: Path) -> None:
    content = measured(tmp_path)
    names = [check["what"] for check in content["checks"]]
    assert sum(REDIS in name for name in names) == 1
    assert all(check["error"] == 0.0 < check["error_if_wrong"] for check in content["checks"])
    row = loads_of(content)[REDIS]
    assert row[1] > 0
    assert row[5] > 0


def test_loads_stages_ceilings_and_the_peer_are_reported(tmp_path: Path) -> None:
    content = measured(tmp_path)
    rows = loads_of(content)
    assert list(rows) == [DISK_COLD, DISK_WARM, REDIS, HOST_CACHE]
    for name in (DISK_WARM, HOST_CACHE):
        _, p50, p95, _, _, ceiling, share = rows[name]
        assert 0 < p50 <= p95
        assert ceiling > 0
        assert share > 0
    times = content["data"]["times"]
    assert times["loads"][DISK_WARM]["rounds"] == 5
    assert {"parse, check, pack, digest", "of which SHA-256 of the file"} <= times["stages"].keys()
    beside = {item["rival_name"]: item["ratio"] for item in content["comparisons"]}
    assert beside["one copy in memory"] > 0
    assert sum("PEFT" in name for name in beside) == 2
    assert [target["measured"] is not None for target in content["targets"]] == [True, True]


def test_what_is_not_there_is_not_measured_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "why_not_evictable", lambda _path: "the page cache is warm: said the test")
    monkeypatch.setattr(redis_process.shutil, "which", lambda _name: None)
    content = measured(tmp_path)
    rows = loads_of(content)
    assert rows[REDIS][1:] == [None, None, None, "redis-server is not installed", None, None]
    assert rows[DISK_COLD][4] == "the page cache is warm: said the test"
    assert rows[DISK_WARM][1] > 0


def test_without_the_redis_package_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "is_installed", lambda library: library != "redis")
    monkeypatch.setitem(sys.modules, "redis", None)
    rows = loads_of(measured(tmp_path))
    assert rows[REDIS][4] == "the redis package is not installed"
    assert rows[HOST_CACHE][1] > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--adapter-rank", "300"], "--adapter-rank 300 is beyond the largest rank, 256"),
        (["--store-dir", "/proc/nowhere"], "--store-dir /proc/nowhere: "),
    ],
)
def test_what_cannot_be_measured_is_refused(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "adapters", "--model", "tiny", "--no-out", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_was_dropped_is_seen_to_be_gone_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(os.urandom(1 << 20))
    assert page_cache.cached_share(path) == 1.0
    reason = page_cache.why_not_evictable(path)
    if reason is not None:
        pytest.skip(f"{page_cache.filesystem_of(tmp_path)}: {reason}")
    assert page_cache.cached_share(path) == 0.0
    buffer = bytearray(1 << 20)
    page_cache.read_file(path, memoryview(buffer))
    assert bytes(buffer) == path.read_bytes()
    assert page_cache.cached_share(path) == 1.0


_HOLDER = """
import sys, time
from pathlib import Path
from weft_server.bench.adapters.redis_process import redis_server
with redis_server(Path(sys.argv[1])) as port:
    print(port, flush=True)
    time.sleep(60)
"""


@pytest.mark.redis
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_redis_server_ends_with_the_benchmark(
    number: signal.Signals, redis_binary: None, tmp_path: Path
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    port = int(holder.stdout.readline())
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(b"PING\r\n")
        assert connection.recv(64) == b"+PONG\r\n"
        holder.send_signal(number)
        holder.wait()
        holder.stdout.close()
        # The end of the server is the end of its connections.
        assert connection.recv(1) == b""
