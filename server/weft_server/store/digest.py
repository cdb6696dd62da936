"""Blob ids: what they look like, how bytes are checked against them. Knows no storage medium."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

from weft_server.store.base import BlobMissing

CHUNK_BYTES = 1 << 20
"""Bytes per chunk, on disk reads and in Redis values alike."""

_BLOB_ID = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)


def blob_id(hex_digest: str) -> str:
    """The id of the blob whose SHA-256 is `hex_digest`."""
    return f"sha256:{hex_digest}"


def hex_digest(blob: str) -> str:
    """The 64 hex digits of a blob id; safe as a file name and as part of a key.

    Raises:
        BlobMissing: `blob` is not an id of a blob, so no blob can have it.
    """
    match = _BLOB_ID.fullmatch(blob)
    if match is None:
        raise BlobMissing(f"{blob!r} is not a blob id (sha256: and 64 hex digits)")
    return match[1]


def is_hex_digest(text: str) -> bool:
    """Whether `text` is the 64 hex digits of some blob id."""
    return _BLOB_ID.fullmatch(blob_id(text)) is not None


def verified(blob: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Pass `chunks` on, the last one only after the whole is known to match the id.

    Raises:
        BlobMissing: the bytes do not have the digest that `blob` names.
    """
    digest = hashlib.sha256()
    held: bytes | None = None
    for chunk in chunks:
        if held is not None:
            yield held
        digest.update(chunk)
        held = chunk
    if blob_id(digest.hexdigest()) != blob:
        raise BlobMissing(f"{blob} is damaged: its bytes no longer match its id")
    if held is not None:
        yield held


def rechunked(chunks: Iterable[bytes], chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The same bytes in chunks of exactly `chunk_bytes`, the last one shorter; never an empty one."""
    pending = bytearray()
    for chunk in chunks:
        view = memoryview(chunk)
        while len(pending) + len(view) >= chunk_bytes:
            taken = chunk_bytes - len(pending)
            pending += view[:taken]
            view = view[taken:]
            yield bytes(pending)
            pending.clear()
        pending += view
    if pending:
        yield bytes(pending)
