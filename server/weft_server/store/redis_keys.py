"""Names of all that Weft keeps in Redis, below `weft:`. Parts chosen by users are quoted: none collide.

weft:schema                       the version of this layout
weft:seq                          the newest record's `seq`
weft:record:<kind>:<tenant>:<id>  hash: value, version, seq
weft:tenant:<kind>:<tenant>       sorted set of `<tenant>:<id>` by `seq`
weft:kind:<kind>                  the same of all tenants
weft:events:<stream>              list: event n at index n - 1
weft:counter:<name>               the last number given
weft:blob:<hex>                   hash: 0, 1, 2, … the chunks; size, chunks, put_at (microseconds)
weft:links:<hex>                  hash: owner to the time of linking (microseconds)
weft:upload:<random>              a blob being put; expires if that stops
"""

from __future__ import annotations

import uuid
from urllib.parse import quote, unquote

SCHEMA_KEY = "weft:schema"
SEQ_KEY = "weft:seq"
BLOB_PREFIX = "weft:blob:"


def record_prefix(kind: str) -> str:
    """What precedes a member of the kind's index in the key of that record."""
    return f"weft:record:{_quoted(kind)}:"


def record_key(kind: str, tenant: str, id_: str) -> str:
    """The record itself."""
    return record_prefix(kind) + member(tenant, id_)


def index_key(kind: str, tenant: str | None) -> str:
    """The index of the records of a kind: one tenant's, or with None everybody's."""
    return (
        f"weft:kind:{_quoted(kind)}" if tenant is None else f"weft:tenant:{_quoted(kind)}:{_quoted(tenant)}"
    )


def member(tenant: str, id_: str) -> str:
    """How an index names a record."""
    return _quoted(tenant) + id_suffix(id_)


def id_suffix(id_: str) -> str:
    """How the members of all tenants' records with this id end."""
    return f":{_quoted(id_)}"


def parse_member(name: bytes) -> tuple[str, str]:
    """Tenant and id of a record, from its name in an index."""
    tenant, id_ = name.decode("ascii").split(":")
    return unquote(tenant), unquote(id_)


def events_key(stream: str) -> str:
    """A stream's events."""
    return f"weft:events:{_quoted(stream)}"


def counter_key(counter: str) -> str:
    """A counter."""
    return f"weft:counter:{_quoted(counter)}"


def blob_key(hex_digest: str) -> str:
    """A complete blob."""
    return BLOB_PREFIX + hex_digest


def links_key(hex_digest: str) -> str:
    """Who links a blob."""
    return f"weft:links:{hex_digest}"


def new_upload_key() -> str:
    """A fresh key for a blob being put."""
    return f"weft:upload:{uuid.uuid4().hex}"


def _quoted(part: str) -> str:
    return quote(part, safe="")
