"""What a store acknowledged is there after kill -9, and nothing is there by half."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weft_server.store.base import Create, StoreUnavailable, Unlink
from weft_server.store.opening import Store, open_store

StartWorker = Callable[..., "subprocess.Popen[str]"]


def read_acknowledged(worker: subprocess.Popen[str], count: int) -> list[tuple[int, int]]:
    """Wait for `count` acknowledged changes; returns (change, counter value) of each."""
    assert worker.stdout is not None
    lines = [worker.stdout.readline().split() for _ in range(count)]
    return [(int(change), int(number)) for change, number in lines]


def read_rest(worker: subprocess.Popen[str]) -> list[tuple[int, int]]:
    """What was acknowledged up to the worker's end; its last line may be cut."""
    assert worker.stdout is not None
    lines = [line.split() for line in worker.stdout if line.endswith("\n")]
    return [(int(words[0]), int(words[1])) for words in lines if words[0].isdigit()]


def check(store: Store, acknowledged: list[tuple[int, int]]) -> None:
    """Every acknowledged change is whole, and whatever else is there is whole too and in its place."""
    store.collect(-60)
    left = store.records.list("left", "t", newest_first=False)
    right = store.records.list("right", "t", newest_first=False)
    events = store.records.events("log")
    names = [str(n) for n in range(len(events))]
    assert [record.id for record in left] == [record.id for record in right] == names
    assert [event.value["n"] for event in events] == list(range(len(events)))
    assert {n for n, _ in acknowledged} <= set(range(len(events)))
    for n, record in enumerate(left):
        content = store.blobs.read_bytes(record.value["blob"])
        assert content == f"{n} ".encode() * (1 + n % 7 * 20_000)
    assert store.records.next_number("changes") > max((number for _, number in acknowledged), default=0)


def test_a_killed_server_loses_nothing_acknowledged(
    store_url: str, tmp_path: Path, start_worker: StartWorker
) -> None:
    acknowledged: list[tuple[int, int]] = []
    for num_changes in (1, 12, 5):
        worker = start_worker(store_url, tmp_path, "write")
        acknowledged += read_acknowledged(worker, num_changes)
        worker.kill()
        worker.wait()
        acknowledged += read_rest(worker)
        with open_store(store_url, tmp_path) as store:
            check(store, acknowledged)
    with open_store(store_url, tmp_path) as store:
        drop_all(store)


def drop_all(store: Store) -> None:
    """The links made before the crash can be dropped after it, which deletes the blobs."""
    for record in store.records.list("left", "t"):
        store.records.apply([Unlink(record.value["blob"], f"left:{record.id}")])
    assert store.collect(-60) == 0


@pytest.mark.redis
def test_a_killed_redis_loses_nothing_acknowledged(
    tmp_path: Path, start_worker: StartWorker, start_redis: Callable[..., Any]
) -> None:
    server = start_redis("--appendfsync", "always")
    acknowledged: list[tuple[int, int]] = []
    for num_changes in (1, 12, 5):
        worker = start_worker(server.url, tmp_path, "write")
        acknowledged += read_acknowledged(worker, num_changes)
        server.kill()
        assert worker.wait(timeout=30) == 0, "the worker sees StoreUnavailable and nothing else"
        acknowledged += read_rest(worker)
        server.start()
        with open_store(server.url, tmp_path) as store:
            check(store, acknowledged)


@pytest.mark.redis
def test_a_store_recovers_by_itself_when_redis_returns(
    tmp_path: Path, start_redis: Callable[..., Any]
) -> None:
    server = start_redis()
    with open_store(server.url, tmp_path) as store:
        store.records.apply([Create("job", "t", "a", {})])
        blob = store.blobs.put([b"x"])
        server.kill()
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="does not answer"):
                store.records.get("job", "t", "a")
        with pytest.raises(StoreUnavailable) as caught:
            store.records.apply([Create("job", "t", "b", {})])
        assert caught.value.status == 503
        assert caught.value.retry_after_s
        with pytest.raises(StoreUnavailable):
            store.blobs.put([b"y"])
        with pytest.raises(StoreUnavailable):
            store.blobs.read(blob)
        server.start()
        assert [record.id for record in store.records.list("job", "t")] == ["a"]
        assert store.blobs.read_bytes(blob) == b"x"
        store.records.apply([Create("job", "t", "b", {})])
