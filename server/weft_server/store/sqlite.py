"""Records, events, counters and blob links in one SQLite file. Knows blobs only as ids to check and delete.

Writes go through one connection, one at a time, each a transaction that is flushed to the device
(`synchronous=FULL`) before it is acknowledged; reads take a connection from a pool and, in WAL mode, never
wait for a write. A connection on which SQLite reported an error is closed and replaced, so the store
recovers once the cause is gone.
"""

from __future__ import annotations

import builtins
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import assert_never

from weft_server.store.base import (
    Append,
    BlobMissing,
    Change,
    Create,
    Delete,
    Event,
    Link,
    Record,
    StaleRecord,
    StoreUnavailable,
    Unlink,
    Update,
)
from weft_server.store.digest import hex_digest
from weft_server.store.disk import DiskBlobStore, make_directory, sync_directory
from weft_server.store.sqlite_schema import migrate
from weft_server.store.values import decode_value, encode_value

_log = logging.getLogger(__name__)

_BUSY_TIMEOUT_S = 5.0
_RETRY_S = 0.01
_COLUMNS = "kind, tenant, id, value, version, seq"

_REASONS = {
    sqlite3.SQLITE_FULL: "the disk is full; make room or choose another --data-dir",
    sqlite3.SQLITE_READONLY: "it is read-only",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; restore it from a backup",
    sqlite3.SQLITE_NOTADB: "the file is not a database; restore it or choose another --data-dir",
    sqlite3.SQLITE_BUSY: "another process holds the write lock",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened",
}


class SqliteRecordStore:
    """A `RecordStore` in the file `path`; the blobs that it links lie in `blobs`."""

    def __init__(self, path: Path, blobs: DiskBlobStore) -> None:
        """Open the file, creating or migrating it.

        Raises:
            StoreUnavailable: the file cannot be opened or is damaged.
            ConfigError: a newer Weft wrote it, or another program.
        """
        self.path = path
        self._blobs = blobs
        self._closed = False
        self._write_lock = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._pool_lock = threading.Lock()
        self._readers: list[sqlite3.Connection] = []
        make_directory(path.parent)
        with self._writing() as db:
            migrate(db, path)
        # The database file itself is a new name in its directory.
        sync_directory(path.parent)

    # ------------------------------------------------------------ records

    def get(self, kind: str, tenant: str, id: str) -> Record | None:  # noqa: A002
        """The record, or None."""
        with self._reading() as db:
            row = db.execute(
                f"SELECT {_COLUMNS} FROM records WHERE kind = ? AND tenant = ? AND id = ?", (kind, tenant, id)
            ).fetchone()
        return None if row is None else _record(row)

    def list(
        self,
        kind: str,
        tenant: str | None,
        *,
        after: str | None = None,
        limit: int | None = None,
        newest_first: bool = True,
    ) -> builtins.list[Record]:
        """Records of a kind in creation order; see `RecordStore.list`."""
        where, values = _scope(kind, tenant)
        with self._reading() as db:
            if after is not None:
                found = db.execute(
                    f"SELECT seq FROM records WHERE {where} AND id = ?", (*values, after)
                ).fetchall()
                if len(found) != 1:
                    raise KeyError(after)
                where += " AND seq < ?" if newest_first else " AND seq > ?"
                values = (*values, found[0][0])
            order = "DESC" if newest_first else "ASC"
            rows = db.execute(
                f"SELECT {_COLUMNS} FROM records WHERE {where} ORDER BY seq {order} LIMIT ?",
                (*values, _row_limit(limit)),
            ).fetchall()
        return [_record(row) for row in rows]

    def apply(self, changes: Sequence[Change]) -> builtins.list[Record]:
        """Apply all changes or none, durably; see `RecordStore.apply`."""
        records: list[Record] = []
        unlinked: dict[str, int] = {}
        with self._writing() as db:
            for change in changes:
                match change:
                    case Create():
                        records.append(_create(db, change))
                    case Update():
                        records.append(_update(db, change))
                    case Delete():
                        _delete(db, change)
                    case Append():
                        _append(db, change)
                    case Link():
                        # Under the write lock, which deleting a blob takes too: it cannot vanish in between.
                        self._blobs.size(change.blob)
                        _link(db, change)
                    case Unlink():
                        hex_digest(change.blob)
                        linked_at_ns = _unlink(db, change)
                        if linked_at_ns is not None:
                            unlinked[change.blob] = max(linked_at_ns, unlinked.get(change.blob, 0))
                    case _:
                        assert_never(change)
        if unlinked:
            self._delete_unlinked(unlinked)
        return records

    # ------------------------------------------------------------ events and counters

    def events(
        self, stream: str, *, after: int = 0, limit: int | None = None, newest_first: bool = False
    ) -> builtins.list[Event]:
        """Events of a stream; see `RecordStore.events`."""
        where, order, values = "stream = ? AND seq > ?", "ASC", (stream, after)
        if newest_first:
            order = "DESC"
            if after:
                where = "stream = ? AND seq < ?"
        with self._reading() as db:
            rows = db.execute(
                f"SELECT seq, value FROM events WHERE {where} ORDER BY seq {order} LIMIT ?",
                (*values, _row_limit(limit)),
            ).fetchall()
        return [Event(seq, decode_value(value)) for seq, value in rows]

    def delete_stream(self, stream: str) -> None:
        """Forget a stream's events; a later one is number 1 again."""
        with self._writing() as db:
            db.execute("DELETE FROM events WHERE stream = ?", (stream,))

    def next_number(self, counter: str) -> int:
        """A durable counter: 1, 2, 3, …; no number is ever returned twice."""
        with self._writing() as db:
            row = db.execute(
                "INSERT INTO counters (name, value) VALUES (?, 1) "
                "ON CONFLICT (name) DO UPDATE SET value = value + 1 RETURNING value",
                (counter,),
            ).fetchone()
        return int(row[0])

    def now(self) -> float:
        """This machine's clock, seconds since the epoch."""
        return time.time()

    # ------------------------------------------------------------ blobs

    def collect(self, older_than_s: float) -> int:
        """Delete blobs without links last put more than `older_than_s` ago, and files of interrupted puts."""
        deadline_ns = time.time_ns() - int(older_than_s * 1e9)
        self._blobs.delete_temporary(deadline_ns)
        with self._reading() as db:
            linked = {row[0] for row in db.execute("SELECT DISTINCT blob FROM blob_links")}
        num_deleted = 0
        for blob in self._blobs.put_before(deadline_ns):
            if blob not in linked:
                num_deleted += self._delete_if_unlinked(blob, put_until_ns=deadline_ns)
        return num_deleted

    def _delete_unlinked(self, unlinked: dict[str, int]) -> None:
        """Delete the blobs whose last link was dropped. That is committed, so failing here fails nobody."""
        for blob, linked_at_ns in unlinked.items():
            try:
                self._delete_if_unlinked(blob, put_until_ns=linked_at_ns)
            except StoreUnavailable as error:
                _log.warning("blob %s is left for the next collection: %s", blob, error)

    def _delete_if_unlinked(self, blob: str, *, put_until_ns: int) -> bool:
        with self._writing() as db:
            if db.execute("SELECT 1 FROM blob_links WHERE blob = ?", (blob,)).fetchone() is not None:
                return False
            with suppress(BlobMissing):
                if self._blobs.put_at_ns(blob) <= put_until_ns:
                    self._blobs.delete(blob)
                    return True
        return False

    # ------------------------------------------------------------ connections

    def close(self) -> None:
        """Close all connections; later calls raise StoreUnavailable."""
        with self._write_lock, self._pool_lock:
            self._closed = True
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            for reader in self._readers:
                reader.close()
            self._readers.clear()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """The one writing connection inside a transaction: committed on exit, undone on any error."""
        with self._write_lock:
            try:
                if self._writer is None:
                    self._writer = self._connect()
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except sqlite3.Error as error:
                if self._writer is not None:
                    self._writer.close()
                    self._writer = None
                raise self._unavailable("write", error) from error
            except BaseException:
                if self._writer is not None:
                    self._roll_back(self._writer)
                raise

    def _roll_back(self, writer: sqlite3.Connection) -> None:
        try:
            if writer.in_transaction:
                writer.execute("ROLLBACK")
        except sqlite3.Error:
            # Closing undoes it too.
            writer.close()
            self._writer = None

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection of the pool in one read transaction, so that its statements see the same state."""
        connection: sqlite3.Connection | None = None
        try:
            connection = self._borrow()
            connection.execute("BEGIN")
            yield connection
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
                connection = None
            raise self._unavailable("read", error) from error
        finally:
            if connection is not None:
                self._give_back(connection)

    def _borrow(self) -> sqlite3.Connection:
        with self._pool_lock:
            if self._readers:
                return self._readers.pop()
        return self._connect()

    def _give_back(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute("COMMIT")
        except sqlite3.Error:
            connection.close()
            return
        with self._pool_lock:
            if not self._closed:
                self._readers.append(connection)
                return
        connection.close()

    def _connect(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreUnavailable(f"{self.path} is closed: the server is stopping", retry_after_s=1.0)
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            mode = _write_ahead(connection)
            if mode != "wal":
                raise StoreUnavailable(
                    f"{self.path} cannot use write-ahead logging (its mode is {mode!r}); "
                    "choose a --data-dir on a local file system"
                )
            connection.execute("PRAGMA synchronous = FULL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _unavailable(self, action: str, error: sqlite3.Error) -> StoreUnavailable:
        # The low byte is the primary code; the rest refines it.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        reason = _REASONS.get(code, str(error))
        return StoreUnavailable(f"cannot {action} {self.path}: {reason} ({error})", retry_after_s=1.0)


# ---------------------------------------------------------------- one change each, inside a transaction


def _create(db: sqlite3.Connection, change: Create) -> Record:
    text = encode_value(change.value)
    row = db.execute(
        "INSERT INTO records (kind, tenant, id, value, version) VALUES (?, ?, ?, ?, 1) "
        f"ON CONFLICT (kind, tenant, id) DO NOTHING RETURNING {_COLUMNS}",
        (change.kind, change.tenant, change.id, text),
    ).fetchone()
    if row is None:
        raise StaleRecord(f"{change.kind} {change.id!r} exists already")
    return _record(row)


def _update(db: sqlite3.Connection, change: Update) -> Record:
    text = encode_value(change.value)
    old = change.record
    # `seq` too: a record that was deleted and created anew starts at version 1 again.
    row = db.execute(
        "UPDATE records SET value = ?, version = version + 1 "
        f"WHERE kind = ? AND tenant = ? AND id = ? AND version = ? AND seq = ? RETURNING {_COLUMNS}",
        (text, old.kind, old.tenant, old.id, old.version, old.seq),
    ).fetchone()
    if row is None:
        raise StaleRecord(f"{old.kind} {old.id!r} is no longer at version {old.version}")
    return _record(row)


def _delete(db: sqlite3.Connection, change: Delete) -> None:
    old = change.record
    deleted = db.execute(
        "DELETE FROM records WHERE kind = ? AND tenant = ? AND id = ? AND version = ? AND seq = ?",
        (old.kind, old.tenant, old.id, old.version, old.seq),
    ).rowcount
    if deleted == 0:
        raise StaleRecord(f"{old.kind} {old.id!r} is no longer at version {old.version}")


def _append(db: sqlite3.Connection, change: Append) -> None:
    db.execute(
        "INSERT INTO events (stream, seq, value) "
        "SELECT ?, COALESCE(MAX(seq), 0) + 1, ? FROM events WHERE stream = ?",
        (change.stream, encode_value(change.value), change.stream),
    )


def _link(db: sqlite3.Connection, change: Link) -> None:
    db.execute(
        "INSERT INTO blob_links (blob, owner, linked_at_ns) VALUES (?, ?, ?) "
        "ON CONFLICT (blob, owner) DO UPDATE SET linked_at_ns = excluded.linked_at_ns",
        (change.blob, change.owner, time.time_ns()),
    )


def _unlink(db: sqlite3.Connection, change: Unlink) -> int | None:
    """Drop the link; returns when it was made, or None if there was none."""
    row = db.execute(
        "DELETE FROM blob_links WHERE blob = ? AND owner = ? RETURNING linked_at_ns",
        (change.blob, change.owner),
    ).fetchone()
    return None if row is None else int(row[0])


def _record(row: tuple[str, str, str, str, int, int]) -> Record:
    kind, tenant, id_, text, version, seq = row
    return Record(kind, tenant, id_, decode_value(text), version, seq)


def _scope(kind: str, tenant: str | None) -> tuple[str, tuple[str | int, ...]]:
    if tenant is None:
        return "kind = ?", (kind,)
    return "kind = ? AND tenant = ?", (kind, tenant)


def _write_ahead(connection: sqlite3.Connection) -> str:
    """Switch to write-ahead logging; the mode that it is in then.

    While another process is just creating the file, SQLite does not wait for this as it does for statements.
    """
    until_s = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            mode: str = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            return mode
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= until_s:
                raise
        time.sleep(_RETRY_S)


def _row_limit(limit: int | None) -> int:
    if limit is None:
        return -1
    if limit < 0:
        raise ValueError(f"limit must not be negative, not {limit}")
    return limit
