"""What a store is: versioned records with atomic multi-record changes, event streams, counters, and blobs.

Two implementations of each Protocol pass one conformance suite: SQLite + disk, and Redis. All calls block,
and may come from any thread; callers in an event loop run them in one. Every call may raise
`StoreUnavailable` (retryable).
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, TypeAlias

from weft_server.errors import Unavailable

JsonObject: TypeAlias = dict[str, Any]


class StoreUnavailable(Unavailable):
    """The store does not answer; nothing was changed, or the change's fate is unknown and must be re-read."""

    default_code = "store_unavailable"


class StaleRecord(Exception):
    """A compare-and-set lost: the record changed, vanished or already existed. Nothing was applied."""


class BlobMissing(Exception):
    """No blob of this id, or its bytes no longer match its id (corruption)."""


@dataclass(frozen=True, slots=True)
class Record:
    """One stored object.

    `version` starts at 1 and grows with every update; `seq` orders by creation, store-wide, and is never
    reused.
    """

    kind: str
    tenant: str
    id: str
    value: JsonObject
    version: int
    seq: int


@dataclass(frozen=True, slots=True)
class Create:
    """Fails the change if (kind, tenant, id) exists."""

    kind: str
    tenant: str
    id: str
    value: JsonObject


@dataclass(frozen=True, slots=True)
class Update:
    """Fails the change unless the stored version equals `record.version`."""

    record: Record
    value: JsonObject


@dataclass(frozen=True, slots=True)
class Delete:
    """Fails the change unless the stored version equals `record.version`."""

    record: Record


@dataclass(frozen=True, slots=True)
class Append:
    """Append an event to a stream; events are numbered from 1."""

    stream: str
    value: JsonObject


@dataclass(frozen=True, slots=True)
class Link:
    """Keep `blob` while `owner` refers to it. Linking twice is linking once."""

    blob: str
    owner: str


@dataclass(frozen=True, slots=True)
class Unlink:
    """Drop `owner`'s reference; a blob without references is deleted.

    If somebody has put the same bytes again since they were linked, they are left for `collect`, as a
    `Link` may follow.
    """

    blob: str
    owner: str


Change: TypeAlias = Create | Update | Delete | Append | Link | Unlink


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a stream."""

    seq: int
    value: JsonObject


class RecordStore(Protocol):
    """Records, events and counters."""

    def get(self, kind: str, tenant: str, id: str) -> Record | None:  # noqa: A002
        """The record, or None."""

    def list(
        self,
        kind: str,
        tenant: str | None,
        *,
        after: str | None = None,
        limit: int | None = None,
        newest_first: bool = True,
    ) -> builtins.list[Record]:
        """Records of a kind in creation order; `tenant=None`: of all tenants; `after` is the last id seen.

        Raises:
            KeyError: `after` names no record of this kind and tenant, or, for all tenants, several.
        """

    def apply(self, changes: Sequence[Change]) -> builtins.list[Record]:
        """Apply all changes or none, durably, in order; returns each created or updated record's new state.

        Raises:
            StaleRecord: one of the compare-and-sets lost; nothing was applied.
            BlobMissing: a `Link` names a blob that is not stored; nothing was applied.
        """

    def events(
        self, stream: str, *, after: int = 0, limit: int | None = None, newest_first: bool = False
    ) -> builtins.list[Event]:
        """Events with `seq > after` (or, newest first, `seq < after` when `after` is not 0)."""

    def next_number(self, counter: str) -> int:
        """A durable counter: 1, 2, 3, …; no number is ever returned twice."""

    def now(self) -> float:
        """The store's clock, seconds since the epoch: the one clock for leases shared by several servers."""

    def delete_stream(self, stream: str) -> None:
        """Forget a stream's events; a later one is number 1 again."""

    def collect(self, older_than_s: float) -> int:
        """Delete blobs without links that were last put more than `older_than_s` ago, and temporary data.

        Returns the number of blobs deleted. Safe at any time, also while other processes put and link.
        """

    def close(self) -> None:
        """Release connections and locks."""


class BlobStore(Protocol):
    """Content-addressed bytes, durable once `put` returns, verified on read.

    A blob that nobody has linked (see `Link`) may be collected an hour after it was put.
    """

    def put(self, chunks: Iterable[bytes]) -> str:
        """Store a stream; returns its id, `sha256:<hex>`. Raises StoreUnavailable (disk full included)."""

    def read(self, blob: str) -> Iterator[bytes]:
        """Stream the bytes. Raises BlobMissing at the call, or before the last chunk if they do not match."""

    def read_bytes(self, blob: str) -> bytes:
        """All the bytes, verified. Raises BlobMissing."""

    def size(self, blob: str) -> int:
        """Number of bytes. Raises BlobMissing."""

    def put_file(self, file: BinaryIO) -> str:
        """`put` of a file object read to its end."""
