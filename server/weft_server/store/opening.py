"""From a `--store` value to open stores. The one place that knows which implementations exist.

    sqlite                       <data_dir>/weft.db and <data_dir>/blobs
    redis://, rediss://, unix:// one Redis server for both; nothing below data_dir

Opening takes no lock on the data directory: the server holds a `DataDirLock` while its engine process opens
the same blobs beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from weft_server.errors import ConfigError
from weft_server.store.base import BlobStore, RecordStore, StoreUnavailable
from weft_server.store.disk import DiskBlobStore
from weft_server.store.sqlite import SqliteRecordStore

UNLINKED_BLOB_LIFE_S = 3600.0
"""How long a blob that nobody links is kept: the longest time between putting and linking it."""

_REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


@dataclass(frozen=True, slots=True)
class Store:
    """An open pair of stores; a context manager that closes them."""

    records: RecordStore
    blobs: BlobStore

    def collect(self, older_than_s: float = UNLINKED_BLOB_LIFE_S) -> int:
        """Delete abandoned blobs; see `RecordStore.collect`. Worth calling once an hour."""
        return self.records.collect(older_than_s)

    def close(self) -> None:
        """Close both; not to be used afterwards."""
        self.records.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_store(url: str, data_dir: Path, *, redis_volatile: bool = False) -> Store:
    """Open records and blobs, and delete what a crash left behind.

    Args:
        url: `sqlite`, or the URL of a Redis server.
        data_dir: where the embedded store lies; created if absent, untouched with Redis.
        redis_volatile: accept a Redis that may lose acknowledged data.

    Raises:
        ConfigError: an unknown or malformed URL, a Redis that would lose data, a file of a newer Weft.
        StoreUnavailable: the server does not answer, or the files cannot be used.
    """
    if url == "sqlite":
        blobs = DiskBlobStore(data_dir / "blobs")
        store = Store(SqliteRecordStore(data_dir / "weft.db", blobs), blobs)
    elif url.startswith(_REDIS_SCHEMES):
        store = _open_redis(url, volatile=redis_volatile)
    else:
        raise _unknown(url)
    try:
        store.collect()
    except BaseException:
        store.close()
        raise
    return store


def _open_redis(url: str, *, volatile: bool) -> Store:
    # Here, so that the embedded store opens where redis-py is not installed.
    from weft_server.store.redis import RedisRecordStore
    from weft_server.store.redis_blobs import RedisBlobStore
    from weft_server.store.redis_server import RedisServer, refuse_lossy_server

    server = RedisServer(url)
    try:
        refuse_lossy_server(server, volatile=volatile)
        return Store(RedisRecordStore(server), RedisBlobStore(server))
    except StoreUnavailable as error:
        server.close()
        # The operator, unlike tenants, may and must know where.
        raise StoreUnavailable(
            f"Redis at {server.address}: {error.message} ({error.__cause__})",
            retry_after_s=error.retry_after_s,
        ) from error
    except BaseException:
        server.close()
        raise


@contextmanager
def open_blobs(url: str, data_dir: Path) -> Iterator[BlobStore]:
    """Open only the blobs that `open_store` with the same arguments opens: what the engine process needs.

    Raises:
        ConfigError: an unknown or malformed URL.
        StoreUnavailable: the directory cannot be used. A Redis that is away shows at the first call.
    """
    if url == "sqlite":
        yield DiskBlobStore(data_dir / "blobs")
    elif url.startswith(_REDIS_SCHEMES):
        from weft_server.store.redis_blobs import RedisBlobStore
        from weft_server.store.redis_server import RedisServer

        server = RedisServer(url)
        try:
            yield RedisBlobStore(server)
        finally:
            server.close()
    else:
        raise _unknown(url)


def _unknown(url: str) -> ConfigError:
    return ConfigError(
        f"--store {url!r} is not known; it is sqlite, redis://host:port/db, rediss://host:port/db or unix://path",
        param="store",
    )
