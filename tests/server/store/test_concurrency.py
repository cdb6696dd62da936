"""Several threads and processes on one store."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from weft_server.store.base import Append, BlobMissing, Create, Link, StaleRecord, Unlink, Update
from weft_server.store.opening import Store, open_blobs, open_store

StartWorker = Callable[..., "subprocess.Popen[str]"]


def test_no_increment_of_racing_processes_is_lost(
    store: Store, store_url: str, tmp_path: Path, start_worker: StartWorker
) -> None:
    store.records.apply([Create("total", "t", "one", {"n": 0})])
    workers = [start_worker(store_url, tmp_path, "increment", 50) for _ in range(3)]
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0, 0]
    record = store.records.get("total", "t", "one")
    assert record is not None
    assert (record.value, record.version) == ({"n": 150}, 151)


def test_no_number_is_given_to_two_processes(
    store: Store, store_url: str, tmp_path: Path, start_worker: StartWorker
) -> None:
    workers = [start_worker(store_url, tmp_path, "numbers", 100) for _ in range(3)]
    numbers = [int(line) for worker in workers for line in worker.communicate(timeout=60)[0].split()]
    assert sorted(numbers) == list(range(1, 301))


def test_one_of_many_threads_wins_each_version(store: Store) -> None:
    num_threads, num_rounds = 8, 15
    store.records.apply([Create("lease", "t", "one", {})])
    barrier = Barrier(num_threads)

    def contend(thread: int) -> int:
        num_wins = 0
        for _ in range(num_rounds):
            barrier.wait()
            record = store.records.get("lease", "t", "one")
            assert record is not None
            barrier.wait()
            try:
                store.records.apply([Update(record, {"owner": thread})])
                num_wins += 1
            except StaleRecord:
                continue
        return num_wins

    with ThreadPoolExecutor(num_threads) as pool:
        assert sum(pool.map(contend, range(num_threads))) == num_rounds


def test_events_appended_by_many_threads_are_numbered_without_gaps(store: Store) -> None:
    def append(thread: int) -> None:
        for n in range(20):
            store.records.apply([Append("log", {"thread": thread, "n": n})])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(append, range(4)))
    events = store.records.events("log")
    assert [event.seq for event in events] == list(range(1, 81))
    for thread in range(4):
        assert [event.value["n"] for event in events if event.value["thread"] == thread] == list(range(20))


def test_a_linked_blob_is_there_however_others_link_and_drop_it(store: Store) -> None:
    """Owners put, link, read and drop the same bytes; a link that succeeded must keep them."""

    def own(owner: str) -> int:
        num_links = 0
        for _ in range(40):
            blob = store.blobs.put([b"the same bytes"])
            try:
                store.records.apply([Link(blob, owner)])
            except BlobMissing:
                continue
            num_links += 1
            assert store.blobs.read_bytes(blob) == b"the same bytes"
            store.records.apply([Unlink(blob, owner)])
        return num_links

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(own, "abcd")) > 0


def test_several_processes_may_create_the_same_store(
    store_url: str, tmp_path: Path, start_worker: StartWorker
) -> None:
    data_dir = tmp_path / "not" / "there" / "yet"
    workers = [start_worker(store_url, data_dir, "numbers", 5) for _ in range(4)]
    numbers = [int(line) for worker in workers for line in worker.communicate(timeout=60)[0].split()]
    assert sorted(numbers) == list(range(1, 21))


def test_a_file_that_another_process_is_just_creating_is_waited_for(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "weft.db", isolation_level=None, check_same_thread=False)
    for statement in ("CREATE TABLE created (x)", "DROP TABLE created", "BEGIN IMMEDIATE"):
        other.execute(statement)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(open_store, "sqlite", tmp_path)
        with pytest.raises(TimeoutError):
            opening.result(timeout=0.3)
        other.execute("ROLLBACK")
        with opening.result(timeout=10) as store:
            store.records.apply([Create("total", "t", "one", {"n": 0})])
    other.close()


def test_the_engines_blobs_are_the_servers(store: Store, store_url: str, tmp_path: Path) -> None:
    with open_blobs(store_url, tmp_path) as engine_blobs:
        blob = engine_blobs.put([b"checkpoint"])
        assert store.blobs.read_bytes(blob) == b"checkpoint"
        store.records.apply([Link(blob, "job:1")])
        store.records.apply([Unlink(blob, "job:1")])
        with pytest.raises(BlobMissing):
            engine_blobs.read(blob)


def test_reads_go_on_while_a_write_waits_for_another_process(tmp_path: Path) -> None:
    with open_store("sqlite", tmp_path) as store:
        store.records.apply([Create("job", "t", "a", {})])
        other = sqlite3.connect(tmp_path / "weft.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(1) as pool:
            write = pool.submit(store.records.apply, [Create("job", "t", "b", {})])
            assert [record.id for record in store.records.list("job", "t")] == ["a"]
            assert not write.done()
            other.execute("ROLLBACK")
            write.result()
        other.close()
        assert [record.id for record in store.records.list("job", "t")] == ["b", "a"]
