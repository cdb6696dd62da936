"""Blobs and the links that keep them: the same behaviour of every store."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from weft_server.store.base import (
    Append,
    BlobMissing,
    BlobStore,
    Change,
    Create,
    Link,
    StaleRecord,
    Unlink,
)
from weft_server.store.opening import Store, open_store

MIB = 1 << 20
ABSENT = "sha256:" + "0" * 64


@pytest.fixture
def blobs(store: Store) -> BlobStore:
    return store.blobs


def exists(store: Store, blob: str) -> bool:
    try:
        store.blobs.size(blob)
    except BlobMissing:
        return False
    return True


def link(store: Store, *changes: Change) -> None:
    store.records.apply(changes)


@pytest.mark.parametrize("num_bytes", [0, 1, 1000, MIB - 1, MIB, MIB + 1, 3 * MIB])
def test_bytes_come_back_whole_under_their_sha256(blobs: BlobStore, num_bytes: int) -> None:
    content = random.Random(num_bytes).randbytes(num_bytes)
    blob = blobs.put([content])
    assert blob == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert blobs.size(blob) == num_bytes
    assert blobs.read_bytes(blob) == b"".join(blobs.read(blob)) == content


def test_how_bytes_are_cut_into_chunks_does_not_matter(blobs: BlobStore) -> None:
    content = random.Random(0).randbytes(2 * MIB + 7)
    cuts = [b"", content[:3], content[3:MIB], b"", content[MIB:], b""]
    assert blobs.put(cuts) == blobs.put([content]) == blobs.put_file(io.BytesIO(content))
    assert blobs.read_bytes(blobs.put(iter(cuts))) == content


def test_reading_does_not_hold_the_whole_blob(blobs: BlobStore) -> None:
    blob = blobs.put([bytes(4 * MIB)])
    assert max(len(chunk) for chunk in blobs.read(blob)) <= MIB


@pytest.mark.parametrize(
    "blob", [ABSENT, "", "sha256:", "sha256:../../etc/passwd", "md5:" + "0" * 64, ABSENT + "\n"]
)
def test_an_unknown_blob_is_missing_at_once(blobs: BlobStore, blob: str) -> None:
    for call in (blobs.read, blobs.read_bytes, blobs.size):
        with pytest.raises(BlobMissing):
            call(blob)


def test_a_source_that_fails_leaves_nothing(blobs: BlobStore, store: Store) -> None:
    class ClientGoneError(OSError):
        pass

    def source() -> Iterator[bytes]:
        yield b"x" * (2 * MIB)
        raise ClientGoneError

    with pytest.raises(ClientGoneError):
        blobs.put(source())
    assert not exists(store, f"sha256:{hashlib.sha256(b'x' * 2 * MIB).hexdigest()}")
    blob = blobs.put([b"next"])
    assert blobs.read_bytes(blob) == b"next"


@pytest.mark.parametrize("offset", [0, MIB - 1])
def test_damage_shows_before_the_last_chunk(
    blobs: BlobStore, damage: Callable[[str, int], None], offset: int
) -> None:
    content = random.Random(0).randbytes(2 * MIB + 5)
    blob = blobs.put([content])
    damage(blob, offset)
    with pytest.raises(BlobMissing, match="damaged"):
        blobs.read_bytes(blob)
    received: list[bytes] = []
    with pytest.raises(BlobMissing, match="damaged"):
        received.extend(blobs.read(blob))
    assert sum(map(len, received)) < len(content)


def test_putting_a_damaged_blob_again_heals_it(blobs: BlobStore, damage: Callable[[str, int], None]) -> None:
    blob = blobs.put([b"content"])
    damage(blob, 3)
    assert blobs.put([b"content"]) == blob
    assert blobs.read_bytes(blob) == b"content"


def test_linking_a_blob_that_is_not_there_applies_nothing(store: Store) -> None:
    with pytest.raises(BlobMissing):
        store.records.apply([Create("file", "t", "a", {}), Append("log", {}), Link(ABSENT, "file:a")])
    assert store.records.get("file", "t", "a") is None
    assert store.records.events("log") == []


@pytest.mark.parametrize("change", [Link("nonsense", "a"), Unlink("nonsense", "a")])
def test_linking_what_is_no_blob_id_is_refused(store: Store, change: Change) -> None:
    with pytest.raises(BlobMissing):
        store.records.apply([change])


def test_dropping_the_last_link_deletes_the_blob(store: Store) -> None:
    blob = store.blobs.put([b"x"])
    link(store, Link(blob, "a"), Link(blob, "b"))
    link(store, Unlink(blob, "a"))
    assert store.blobs.read_bytes(blob) == b"x"
    link(store, Unlink(blob, "b"))
    assert not exists(store, blob)


def test_linking_twice_is_linking_once(store: Store) -> None:
    blob = store.blobs.put([b"x"])
    link(store, Link(blob, "a"))
    link(store, Link(blob, "a"))
    link(store, Unlink(blob, "a"))
    assert not exists(store, blob)


def test_dropping_a_link_that_is_not_there_does_nothing(store: Store) -> None:
    blob = store.blobs.put([b"x"])
    link(store, Unlink(blob, "a"), Unlink(ABSENT, "a"))
    assert exists(store, blob)
    link(store, Link(blob, "a"))
    link(store, Unlink(blob, "b"))
    assert exists(store, blob)


def test_a_blob_handed_over_in_one_apply_stays(store: Store) -> None:
    blob = store.blobs.put([b"x"])
    link(store, Link(blob, "a"))
    link(store, Unlink(blob, "a"), Link(blob, "b"))
    assert exists(store, blob)
    link(store, Unlink(blob, "b"))
    assert not exists(store, blob)


def test_a_stale_apply_drops_no_link(store: Store) -> None:
    blob = store.blobs.put([b"x"])
    link(store, Create("file", "t", "a", {}), Link(blob, "a"))
    with pytest.raises(StaleRecord):
        store.records.apply([Unlink(blob, "a"), Create("file", "t", "a", {})])
    assert exists(store, blob)
    store.collect(-60)
    assert exists(store, blob)


def test_bytes_put_again_outlive_the_last_link_until_collected(store: Store) -> None:
    blob = store.blobs.put([b"x"])
    link(store, Link(blob, "a"))
    store.blobs.put([b"x"])
    link(store, Unlink(blob, "a"))
    link(store, Link(blob, "b"))
    assert store.blobs.read_bytes(blob) == b"x"
    store.blobs.put([b"x"])
    link(store, Unlink(blob, "b"))
    assert store.collect(-60) == 1
    assert not exists(store, blob)


def test_collecting_deletes_only_old_blobs_that_nobody_links(store: Store) -> None:
    linked, abandoned = store.blobs.put([b"linked"]), store.blobs.put([b"abandoned"])
    link(store, Link(linked, "a"))
    assert store.collect(60) == 0
    assert exists(store, abandoned)
    # A negative age counts blobs as old that are yet to be put.
    assert store.collect(-60) == 1
    assert not exists(store, abandoned)
    assert store.blobs.read_bytes(linked) == b"linked"


def test_an_interrupted_put_on_disk_is_collected_when_old(tmp_path: Path) -> None:
    with open_store("sqlite", tmp_path) as store:
        leftover = tmp_path / "blobs" / "tmp" / "leftover"
        leftover.write_bytes(b"half")
        assert store.collect(60) == 0
        assert leftover.exists()
        store.collect(-60)
        assert not leftover.exists()
