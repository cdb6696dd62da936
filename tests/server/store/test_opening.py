"""Opening a store: what is accepted, what is refused, and what the messages say."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from weft_server.errors import ConfigError
from weft_server.store.base import Create, Link, StoreUnavailable, Unlink, Update
from weft_server.store.opening import Store, open_blobs, open_store

StartRedis = Callable[..., Any]


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond this: the kernel refuses the write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("url", ["", "SQLITE", "sqlite:///x", "postgres://x", "/data", "redis:/x"])
def test_an_unknown_store_is_refused_naming_what_is_allowed(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sqlite, redis://") as caught:
        open_store(url, tmp_path)
    assert repr(url) in caught.value.message
    with pytest.raises(ConfigError), open_blobs(url, tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["redis://h:port/0", "redis://h:70000/0"])
def test_a_malformed_redis_url_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="malformed"):
        open_store(url, tmp_path)


def test_what_was_stored_is_there_when_opened_again(store_url: str, tmp_path: Path) -> None:
    with open_store(store_url, tmp_path) as store:
        blob = store.blobs.put([b"x"])
        (record,) = store.records.apply([Create("job", "t", "a", {"x": 1}), Link(blob, "a")])
        assert store.records.next_number("n") == 1
    with open_store(store_url, tmp_path) as store:
        assert store.records.get("job", "t", "a") == record
        assert store.blobs.read_bytes(blob) == b"x"
        assert store.records.next_number("n") == 2
        store.records.apply([Update(record, {"x": 2}), Unlink(blob, "a")])


def test_opening_collects_blobs_that_were_abandoned_an_hour_ago(tmp_path: Path) -> None:
    with open_store("sqlite", tmp_path) as store:
        old, young = store.blobs.put([b"old"]), store.blobs.put([b"young"])
    digest = old.removeprefix("sha256:")
    two_hours_ago = time.time() - 7200
    os.utime(tmp_path / "blobs" / digest[:2] / digest, (two_hours_ago, two_hours_ago))
    with open_store("sqlite", tmp_path) as store:
        assert store.blobs.size(young) == 5
        assert store.collect() == 0
        with pytest.raises(Exception, match="no blob"):
            store.blobs.size(old)


# ---------------------------------------------------------------- the embedded store


def test_a_database_of_a_newer_weft_is_refused(tmp_path: Path) -> None:
    open_store("sqlite", tmp_path).close()
    with sqlite3.connect(tmp_path / "weft.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(ConfigError, match=r"newer Weft \(schema 99"):
        open_store("sqlite", tmp_path)


def test_a_database_of_another_program_is_refused_untouched(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "weft.db") as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    with pytest.raises(ConfigError, match="another program"):
        open_store("sqlite", tmp_path)
    with sqlite3.connect(tmp_path / "weft.db") as db:
        assert [row[0] for row in db.execute("SELECT name FROM sqlite_schema")] == ["theirs"]
    db.close()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "weft.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreUnavailable, match=r"weft\.db.*not a database"):
        open_store("sqlite", tmp_path)


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    with open_store("sqlite", tmp_path) as store:
        store.records.apply([Create("job", "t", str(n), {"x": "y" * 500}) for n in range(200)])
    path = tmp_path / "weft.db"
    content = path.read_bytes()
    path.write_bytes(content[:8192] + b"\xff" * (len(content) - 8192))
    with pytest.raises(StoreUnavailable, match=r"weft\.db.*damaged"):
        open_store("sqlite", tmp_path)
    path.write_bytes(content)
    with open_store("sqlite", tmp_path) as store:
        assert len(store.records.list("job", "t")) == 200


def test_a_data_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(StoreUnavailable, match=str(tmp_path / "data")):
        open_store("sqlite", tmp_path / "data")


def test_a_closed_store_is_unavailable(tmp_path: Path) -> None:
    store = open_store("sqlite", tmp_path)
    store.close()
    store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        store.records.get("job", "t", "a")
    with pytest.raises(StoreUnavailable, match="closed"):
        store.records.apply([Create("job", "t", "a", {})])


def test_a_blob_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with open_store("sqlite", tmp_path) as store:
        with file_size_limit(100_000), pytest.raises(StoreUnavailable, match="make room") as caught:
            store.blobs.put([bytes(60_000), bytes(60_000)])
        assert str(tmp_path / "blobs") in caught.value.message
        assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == []
        assert store.blobs.size(store.blobs.put([bytes(120_000)])) == 120_000


def test_a_full_disk_found_out_when_flushing_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_store("sqlite", tmp_path) as store:
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(StoreUnavailable, match="the disk is full"):
            store.blobs.put([b"x"])
        assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == []


def test_a_change_that_does_not_fit_is_refused_whole(tmp_path: Path) -> None:
    with open_store("sqlite", tmp_path) as store:
        (first,) = store.records.apply([Create("job", "t", "a", {})])
        wide = [Create("job", "t", f"wide{n}", {"x": "y" * 100_000}) for n in range(10)]
        with file_size_limit(300_000), pytest.raises(StoreUnavailable, match=r"weft\.db"):
            store.records.apply([Update(first, {"x": 1}), *wide])
        assert store.records.list("job", "t") == [first]
        store.records.apply([Update(first, {"x": 1}), *wide])
        assert len(store.records.list("job", "t")) == 11


# ---------------------------------------------------------------- Redis


def opened(server: Any, tmp_path: Path, **options: Any) -> Store:
    return open_store(server.url, tmp_path, **options)


@pytest.mark.redis
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--appendonly", "no"], "append-only file is off"),
        (["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"], "maxmemory-policy allkeys-lru"),
        (["--maxmemory", "100mb", "--maxmemory-policy", "volatile-ttl"], "maxmemory-policy volatile-ttl"),
    ],
)
def test_a_redis_that_would_lose_data_is_refused_unless_volatile(
    start_redis: StartRedis,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    options: list[str],
    message: str,
) -> None:
    server = start_redis(*options)
    with pytest.raises(ConfigError, match=message) as caught:
        opened(server, tmp_path)
    assert "--redis-volatile" in caught.value.message
    assert server.client.dbsize() == 0
    with caplog.at_level(logging.WARNING), opened(server, tmp_path, redis_volatile=True) as store:
        assert store.records.next_number("n") == 1
    assert message in caplog.text


@pytest.mark.redis
@pytest.mark.parametrize(
    "options",
    [["--maxmemory-policy", "allkeys-lru"], ["--maxmemory", "100mb", "--maxmemory-policy", "noeviction"]],
)
def test_a_redis_that_cannot_evict_is_accepted(
    start_redis: StartRedis, tmp_path: Path, options: list[str]
) -> None:
    with opened(start_redis(*options), tmp_path) as store:
        assert store.records.next_number("n") == 1


@pytest.mark.redis
def test_a_redis_that_forbids_config_is_accepted_saying_so(
    start_redis: StartRedis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_redis("--rename-command", "CONFIG", '""')
    with caplog.at_level(logging.WARNING), opened(server, tmp_path) as store:
        assert store.records.next_number("n") == 1
    assert "forbids CONFIG" in caplog.text


@pytest.mark.redis
def test_a_redis_that_forbids_config_and_would_lose_data_is_refused(
    start_redis: StartRedis, tmp_path: Path
) -> None:
    server = start_redis("--rename-command", "CONFIG", '""', "--appendonly", "no")
    with pytest.raises(ConfigError, match="append-only file is off"):
        opened(server, tmp_path)


@pytest.mark.redis
def test_a_redis_that_cannot_be_checked_is_refused(start_redis: StartRedis, tmp_path: Path) -> None:
    server = start_redis()
    server.client.acl_setuser(
        "weft", enabled=True, passwords=["+secret"], keys=["*"], categories=["+@all"], commands=["-info"]
    )
    url = server.url.replace("redis://", "redis://weft:secret@")
    with pytest.raises(ConfigError, match="INFO is forbidden"):
        open_store(url, tmp_path)
    with open_store(url, tmp_path, redis_volatile=True) as store:
        assert store.records.next_number("n") == 1


@pytest.mark.redis
def test_a_wrong_password_is_refused_without_being_shown(start_redis: StartRedis, tmp_path: Path) -> None:
    server = start_redis("--requirepass", "right")
    for url in (server.url, server.url.replace("redis://", "redis://:wrong@")):
        with pytest.raises(ConfigError, match="does not let this user in") as caught:
            open_store(url, tmp_path)
        assert "wrong@" not in caught.value.message
    with open_store(server.url.replace("redis://", "redis://:right@"), tmp_path) as store:
        assert store.records.next_number("n") == 1


@pytest.mark.redis
def test_a_redis_cluster_is_refused(start_redis: StartRedis, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cluster"):
        opened(start_redis("--cluster-enabled", "yes"), tmp_path)


@pytest.mark.redis
def test_data_of_another_schema_is_refused(start_redis: StartRedis, tmp_path: Path) -> None:
    server = start_redis()
    server.client.set("weft:schema", 99)
    with pytest.raises(ConfigError, match="schema 99"):
        opened(server, tmp_path)


@pytest.mark.redis
def test_a_unix_socket_and_a_database_number_work(start_redis: StartRedis, tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    server = start_redis("--unixsocket", str(path))
    with open_store(f"unix://{path}?db=3", tmp_path) as store:
        store.records.next_number("n")
    assert server.client.dbsize() == 0


@pytest.mark.redis
def test_everything_in_redis_is_below_one_prefix(start_redis: StartRedis, tmp_path: Path) -> None:
    server = start_redis()
    with opened(server, tmp_path) as store:
        blob = store.blobs.put([b"x"])
        store.records.apply([Create("job", "t", "a", {}), Link(blob, "a")])
        store.records.next_number("n")
    keys = server.client.keys("*")
    assert len(keys) == 8
    assert all(key.startswith(b"weft:") for key in keys)


@pytest.mark.redis
def test_a_redis_without_memory_refuses_writes_whole_and_serves_reads(
    start_redis: StartRedis, tmp_path: Path
) -> None:
    server = start_redis()
    with opened(server, tmp_path) as store:
        blob = store.blobs.put([b"x"])
        (record,) = store.records.apply([Create("job", "t", "a", {}), Link(blob, "a")])
        server.client.config_set("maxmemory", 1)
        with pytest.raises(StoreUnavailable, match="maxmemory"):
            store.records.apply([Create("job", "t", "b", {}), Update(record, {"x": 1})])
        with pytest.raises(StoreUnavailable, match="maxmemory"):
            store.blobs.put([b"y"])
        assert store.records.list("job", "t") == [record]
        with opened(server, tmp_path) as second:
            assert second.blobs.read_bytes(blob) == b"x"
        store.records.apply([Unlink(blob, "a")])
        server.client.config_set("maxmemory", 0)
        store.records.apply([Create("job", "t", "b", {}), Update(record, {"x": 1})])
    assert server.client.keys("weft:upload:*") == server.client.keys("weft:blob:*") == []


@pytest.mark.redis
def test_an_upload_that_redis_lost_half_of_is_not_published(start_redis: StartRedis, tmp_path: Path) -> None:
    server = start_redis()

    def source() -> Iterator[bytes]:
        yield bytes(1 << 20)
        server.client.delete(*server.client.keys("weft:upload:*"))
        yield bytes(1 << 20)

    with opened(server, tmp_path) as store, pytest.raises(StoreUnavailable, match="lost part"):
        store.blobs.put(source())
    assert server.client.keys("weft:blob:*") == []


@pytest.mark.redis
def test_an_interrupted_upload_expires(start_redis: StartRedis, tmp_path: Path) -> None:
    server = start_redis()
    remaining_ms = []

    def source() -> Iterator[bytes]:
        yield bytes(1 << 20)
        remaining_ms.append(server.client.pttl(server.client.keys("weft:upload:*")[0]))

    with opened(server, tmp_path) as store:
        blob = store.blobs.put(source())
    assert 0 < remaining_ms[0] <= 3_600_000
    assert server.client.pttl(f"weft:blob:{blob.removeprefix('sha256:')}") == -1


def test_a_redis_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(StoreUnavailable, match=address):
            open_store(f"redis://{address}/0", tmp_path)


@pytest.mark.redis
def test_a_redis_that_hangs_is_unavailable_and_usable_once_it_goes_on(
    start_redis: StartRedis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_redis()
    with opened(server, tmp_path) as store:
        server.signal(signal.SIGSTOP)
        with pytest.raises(StoreUnavailable, match="does not answer") as caught:
            store.records.next_number("n")
        assert str(server.port) not in caught.value.message, "tenants need not know where the store is"
        assert any(str(server.port) in record.getMessage() for record in caplog.records)
        server.signal(signal.SIGCONT)
        # The first may or may not have counted before its answer was given up on.
        assert store.records.next_number("n") in (1, 2)
