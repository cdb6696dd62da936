"""The tables of the SQLite store and how older files become current ones.

`MIGRATIONS[v]` takes a file from version v to v + 1; a released entry never changes. A new file goes through
all of them.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from weft_server.errors import ConfigError

APPLICATION_ID = 0x57656674
"""Marks the file as Weft's ("Weft" in ASCII)."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE records (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            kind TEXT NOT NULL,
            tenant TEXT NOT NULL,
            id TEXT NOT NULL,
            version INTEGER NOT NULL,
            value TEXT NOT NULL,
            UNIQUE (kind, tenant, id)
        )""",
        "CREATE INDEX records_of_kind ON records (kind, seq)",
        "CREATE INDEX records_of_tenant ON records (kind, tenant, seq)",
        """CREATE TABLE events (
            stream TEXT NOT NULL,
            seq INTEGER NOT NULL,
            value TEXT NOT NULL,
            PRIMARY KEY (stream, seq)
        ) WITHOUT ROWID""",
        "CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
        """CREATE TABLE blob_links (
            blob TEXT NOT NULL,
            owner TEXT NOT NULL,
            linked_at_ns INTEGER NOT NULL,
            PRIMARY KEY (blob, owner)
        ) WITHOUT ROWID""",
    ),
)

SCHEMA_VERSION = len(MIGRATIONS)


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Bring the file to `SCHEMA_VERSION`, inside the caller's transaction.

    Raises:
        ConfigError: the file is another program's, or a newer Weft's, or the SQLite library is too old.
    """
    if sqlite3.sqlite_version_info < (3, 35):
        raise ConfigError(f"SQLite 3.35 or newer is needed; this Python has {sqlite3.sqlite_version}")
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    application = int(db.execute("PRAGMA application_id").fetchone()[0])
    is_empty = db.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0] == 0
    if application != APPLICATION_ID and not is_empty:
        raise ConfigError(f"{path} is a database of another program; choose another --data-dir")
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"{path} was written by a newer Weft (schema {version}; this one knows up to {SCHEMA_VERSION}); "
            "upgrade Weft or choose another --data-dir"
        )
    if version == SCHEMA_VERSION:
        return
    for statements in MIGRATIONS[version:]:
        for statement in statements:
            db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
