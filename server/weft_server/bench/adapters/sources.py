"""Where an adapter lies before it is asked for: the disk store, Redis, the host cache. Each with how it is
read, and the least that reading as many bytes takes here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from weft_server.adapters.fetch import ReadBlob
from weft_server.bench.adapters.bare_redis import BareRedis
from weft_server.bench.adapters.page_cache import evict, read_file, why_not_evictable
from weft_server.bench.adapters.redis_process import redis_server, why_no_server
from weft_server.bench.adapters.route import AdapterFiles, Route, Target
from weft_server.bench.surroundings import is_installed
from weft_server.protocol import AdapterRef
from weft_server.store.digest import hex_digest
from weft_server.store.disk import DiskBlobStore

DISK_COLD = "disk, page cache dropped"
DISK_WARM = "disk, page cache warm"
REDIS = "Redis on this machine"
HOST_CACHE = "host cache"

_PIECE_BYTES = 256 << 20
"""Of what the bare client gets at a time: Redis allows strings of twice as much."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One place that can be measured.

    Attributes:
        name: in words.
        route: from asking for the adapter until it can be used.
        read: reads and verifies its bytes alone; None where nothing is read.
        ceiling: what `best` does, in words.
        best: the least that brings as many bytes into host memory (for the host cache, onto the device).
        before: what makes the place as cold, or as warm, as its name says; not timed.
        num_bytes: what rates count.
    """

    name: str
    route: Route
    read: Callable[[], object] | None
    ceiling: str
    best: Callable[[], object]
    before: Callable[[], object]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Absent:
    """A place that cannot be measured here, and why."""

    name: str
    reason: str


class _BlobStore(Protocol):
    def put(self, chunks: list[bytes]) -> str: ...

    def read_bytes(self, blob: str) -> bytes: ...


@contextmanager
def open_sources(files: AdapterFiles, target: Target, folder: Path) -> Iterator[list[Source | Absent]]:
    """Every place, with the adapter in it.

    Args:
        folder: where the disk store is made.

    Raises:
        BenchError: the Redis server does not start.
        StoreUnavailable: the disk refuses.
    """
    with ExitStack() as stack:
        disk = DiskBlobStore(folder / "blobs")
        on_disk = _put(disk, files)
        cold_and_warm = _disk_sources(stack, files, target, disk, on_disk)
        redis = _redis_source(stack, files, target, folder)
        yield [*cold_and_warm, redis, _host_source(stack, target, disk, on_disk)]


def _disk_sources(
    stack: ExitStack, files: AdapterFiles, target: Target, disk: DiskBlobStore, adapter: AdapterRef
) -> list[Source | Absent]:
    paths = [
        disk.root / digest[:2] / digest
        for digest in map(hex_digest, (adapter.config_blob, adapter.weights_blob))
    ]
    buffer = memoryview(bytearray(files.nbytes))
    route = _route(stack, disk.read_bytes, adapter, target)

    def drop() -> None:
        for path in paths:
            evict(path)

    def source(name: str, before: Callable[[], object]) -> Source:
        return Source(
            name=name,
            route=route,
            read=lambda: _read(disk, adapter),
            ceiling="one sequential read of the file",
            best=lambda: read_file(paths[1], buffer),
            before=before,
            num_bytes=files.nbytes,
        )

    reason = why_not_evictable(paths[1])
    return [
        source(DISK_COLD, drop) if reason is None else Absent(DISK_COLD, reason),
        source(DISK_WARM, lambda: _read(disk, adapter)),
    ]


def _redis_source(stack: ExitStack, files: AdapterFiles, target: Target, folder: Path) -> Source | Absent:
    reason = None if is_installed("redis") else "the redis package is not installed"
    reason = reason or why_no_server()
    if reason is not None:
        return Absent(REDIS, reason)
    from weft_server.store.redis_blobs import RedisBlobStore
    from weft_server.store.redis_server import RedisServer

    port = stack.enter_context(redis_server(folder))
    server = RedisServer(f"redis://127.0.0.1:{port}/0")
    stack.callback(server.close)
    blobs = RedisBlobStore(server)
    adapter = _put(blobs, files)
    bare = stack.enter_context(BareRedis(port))
    buffer = memoryview(bytearray(files.nbytes))
    pieces = {
        b"ceiling-%d" % start: slice(start, start + _PIECE_BYTES)
        for start in range(0, files.nbytes, _PIECE_BYTES)
    }
    for key, piece in pieces.items():
        bare.command(b"SET", key, files.safetensors[piece])

    def get() -> None:
        for key, piece in pieces.items():
            bare.get_into(key, buffer[piece])

    return Source(
        name=REDIS,
        route=_route(stack, blobs.read_bytes, adapter, target),
        read=lambda: _read(blobs, adapter),
        ceiling="one GET of as many bytes by a bare client",
        best=get,
        before=lambda: None,
        num_bytes=files.nbytes,
    )


def _host_source(stack: ExitStack, target: Target, disk: DiskBlobStore, adapter: AdapterRef) -> Source:
    route = _route(stack, disk.read_bytes, adapter, target, keep=True)
    route.seconds()
    num_elements = target.num_elements
    host = torch.ones(num_elements, dtype=target.dtype, pin_memory=target.on_gpu)
    device = torch.empty(num_elements, dtype=target.dtype, device=target.device)

    def copy() -> None:
        device.copy_(host, non_blocking=True)
        target.synchronize()

    return Source(
        name=HOST_CACHE,
        route=route,
        read=None,
        ceiling="one copy from pinned memory" if target.on_gpu else "one copy in memory",
        best=copy,
        before=lambda: None,
        num_bytes=host.nbytes,
    )


def _route(
    stack: ExitStack, read_blob: ReadBlob, adapter: AdapterRef, target: Target, *, keep: bool = False
) -> Route:
    route = Route(read_blob, adapter, target, keep=keep)
    stack.callback(route.close)
    return route


def _put(store: _BlobStore, files: AdapterFiles) -> AdapterRef:
    config_blob, weights_blob = store.put([files.config_json]), store.put([files.safetensors])
    return AdapterRef(files.packed.digest, config_blob, weights_blob, files.nbytes)


def _read(store: _BlobStore, adapter: AdapterRef) -> None:
    store.read_bytes(adapter.config_blob)
    store.read_bytes(adapter.weights_blob)
