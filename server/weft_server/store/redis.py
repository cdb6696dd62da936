"""Records, events, counters and blob links in Redis. What must be atomic is a script (`redis_scripts.py`).

Several servers may share one Redis; its clock is theirs. An acknowledged change is as durable as the server's
append-only file (`redis_server.py`).
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import assert_never

from weft_server.errors import ConfigError
from weft_server.store import redis_keys as keys
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
    Unlink,
    Update,
)
from weft_server.store.digest import hex_digest
from weft_server.store.redis_scripts import APPLY, COLLECT_BLOB, LIST
from weft_server.store.redis_server import RedisServer, Word
from weft_server.store.values import decode_value, encode_value

SCHEMA_VERSION = 1


class RedisRecordStore:
    """A `RecordStore` in Redis, which owns the server object that it is given."""

    def __init__(self, server: RedisServer) -> None:
        """Check the layout of what is stored, and mark an empty database as Weft's.

        Raises:
            ConfigError: another version of Weft wrote it.
            StoreUnavailable: the server does not answer.
        """
        self._server = server
        self._apply = server.script(APPLY)
        self._list = server.script(LIST)
        self._collect = server.script(COLLECT_BLOB)
        if server.command("GET", keys.SCHEMA_KEY) is None:
            server.command("SET", keys.SCHEMA_KEY, SCHEMA_VERSION, "NX")
        version = int(server.command("GET", keys.SCHEMA_KEY))
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"Redis at {server.address} holds data of another Weft (schema {version}; this one "
                f"knows {SCHEMA_VERSION}); use that version, or another database number",
                param="store",
            )

    # ------------------------------------------------------------ records

    def get(self, kind: str, tenant: str, id: str) -> Record | None:  # noqa: A002
        """The record, or None."""
        value, version, seq = self._server.command(
            "HMGET", keys.record_key(kind, tenant, id), "value", "version", "seq"
        )
        if value is None:
            return None
        return Record(kind, tenant, id, decode_value(value), int(version), int(seq))

    def list(
        self,
        kind: str,
        tenant: str | None,
        *,
        after: str | None = None,
        limit: int | None = None,
        newest_first: bool = True,
    ) -> list[Record]:
        """Records of a kind in creation order; see `RecordStore.list`.

        With `after` and no tenant, the kind's whole index is searched for the id.
        """
        _check_limit(limit)
        after_member = after_suffix = ""
        if after is not None:
            if tenant is None:
                after_suffix = keys.id_suffix(after)
            else:
                after_member = keys.member(tenant, after)
        found = self._list(
            [keys.index_key(kind, tenant)],
            [
                keys.record_prefix(kind),
                "newest" if newest_first else "oldest",
                "" if limit is None else limit,
                after_member,
                after_suffix,
            ],
        )
        if found is None:
            raise KeyError(after)
        return [
            Record(kind, *keys.parse_member(name), decode_value(value), int(version), int(seq))
            for name, value, version, seq in zip(*[iter(found)] * 4, strict=True)
        ]

    def apply(self, changes: Sequence[Change]) -> builtins.list[Record]:
        """Apply all changes or none, durably; see `RecordStore.apply`."""
        script_keys: builtins.list[Word] = [keys.SEQ_KEY]
        script_args: builtins.list[Word] = []
        for change in changes:
            change_keys, change_args = _encode_change(change)
            script_keys += change_keys
            script_args += change_args
        status, *numbers = self._apply(script_keys, script_args)
        if status == b"stale":
            raise StaleRecord(_describe(changes[int(numbers[0])]))
        if status == b"missing":
            raise BlobMissing(_describe(changes[int(numbers[0])]))
        written = [change for change in changes if isinstance(change, Create | Update)]
        states = zip(numbers[::2], numbers[1::2], strict=True)
        return [_written(change, int(v), int(seq)) for change, (v, seq) in zip(written, states, strict=True)]

    # ------------------------------------------------------------ events and counters

    def events(
        self, stream: str, *, after: int = 0, limit: int | None = None, newest_first: bool = False
    ) -> builtins.list[Event]:
        """Events of a stream; see `RecordStore.events`."""
        _check_limit(limit)
        if limit == 0:
            return []
        key = keys.events_key(stream)
        # Events are only ever added at the end, so the two commands need not be one.
        num_events = int(self._server.command("LLEN", key))
        if newest_first:
            last = min(num_events, after - 1) if after else num_events
            first = 1 if limit is None else max(1, last - limit + 1)
        else:
            first = after + 1
            last = num_events if limit is None else min(num_events, after + limit)
        if first > last:
            return []
        values = self._server.command("LRANGE", key, first - 1, last - 1)
        events = [Event(seq, decode_value(value)) for seq, value in enumerate(values, first)]
        return events[::-1] if newest_first else events

    def delete_stream(self, stream: str) -> None:
        """Forget a stream's events; a later one is number 1 again."""
        self._server.command("UNLINK", keys.events_key(stream))

    def next_number(self, counter: str) -> int:
        """A durable counter: 1, 2, 3, …; no number is ever returned twice."""
        return int(self._server.command("INCR", keys.counter_key(counter)))

    def now(self) -> float:
        """The Redis server's clock, seconds since the epoch."""
        seconds, microseconds = self._server.command("TIME")
        return int(seconds) + int(microseconds) / 1e6

    # ------------------------------------------------------------ blobs and connections

    def collect(self, older_than_s: float) -> int:
        """Delete blobs without links last put more than `older_than_s` ago.

        What interrupted puts left behind expires by itself.
        """
        num_deleted = 0
        for key in self._server.scan(f"{keys.BLOB_PREFIX}*"):
            digest = key.decode("ascii").removeprefix(keys.BLOB_PREFIX)
            num_deleted += self._collect([key, keys.links_key(digest)], [int(older_than_s * 1e6)])
        return num_deleted

    def close(self) -> None:
        """Close all connections."""
        self._server.close()


# ---------------------------------------------------------------- changes, as the APPLY script reads them


def _encode_change(change: Change) -> tuple[list[str], list[str]]:
    """Keys and arguments of one change."""
    match change:
        case Create(kind, tenant, id_, value):
            return _record_keys(kind, tenant, id_), ["create", keys.member(tenant, id_), encode_value(value)]
        case Update(old, value):
            record_key = keys.record_key(old.kind, old.tenant, old.id)
            return [record_key], ["update", str(old.version), str(old.seq), encode_value(value)]
        case Delete(old):
            return (
                _record_keys(old.kind, old.tenant, old.id),
                ["delete", keys.member(old.tenant, old.id), str(old.version), str(old.seq)],
            )
        case Append(stream, value):
            return [keys.events_key(stream)], ["append", encode_value(value)]
        case Link(blob, owner):
            return _blob_keys(blob), ["link", owner]
        case Unlink(blob, owner):
            return _blob_keys(blob), ["unlink", owner]
        case _:
            assert_never(change)


def _record_keys(kind: str, tenant: str, id_: str) -> list[str]:
    return [keys.record_key(kind, tenant, id_), keys.index_key(kind, tenant), keys.index_key(kind, None)]


def _blob_keys(blob: str) -> list[str]:
    digest = hex_digest(blob)
    return [keys.blob_key(digest), keys.links_key(digest)]


def _written(change: Create | Update, version: int, seq: int) -> Record:
    """The record's new state, with the value as it will be read."""
    of = change if isinstance(change, Create) else change.record
    return Record(of.kind, of.tenant, of.id, decode_value(encode_value(change.value)), version, seq)


def _describe(change: Change) -> str:
    match change:
        case Create():
            return f"{change.kind} {change.id!r} exists already"
        case Update(old, _) | Delete(old):
            return f"{old.kind} {old.id!r} is no longer at version {old.version}"
        case Link(blob, _) | Unlink(blob, _):
            return f"there is no blob {blob}"
        case Append(stream, _):
            return f"stream {stream!r}"
        case _:
            assert_never(change)


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 0:
        raise ValueError(f"limit must not be negative, not {limit}")
