"""Blobs in Redis, in chunks of 1 MiB. Knows nothing of records or links.

A blob is written under a random key that expires if the writer dies; when all chunks are there, one script
checks their number, writes the manifest and renames the key to the blob's own. So a blob's key always
stands for all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import BinaryIO

from weft_server.store.base import BlobMissing, StoreUnavailable
from weft_server.store.digest import CHUNK_BYTES, blob_id, hex_digest, rechunked, verified
from weft_server.store.redis_keys import blob_key, new_upload_key
from weft_server.store.redis_scripts import PUBLISH_BLOB
from weft_server.store.redis_server import RedisServer

_UPLOAD_LIFE_MS = 3_600_000


class RedisBlobStore:
    """A `BlobStore` in Redis. The server object belongs to the caller."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._publish = server.script(PUBLISH_BLOB)

    def put(self, chunks: Iterable[bytes]) -> str:
        """Store a stream; returns its id. What `chunks` raises passes through, and nothing is stored.

        Raises:
            StoreUnavailable: the server does not answer, or has no memory left.
        """
        upload = new_upload_key()
        try:
            return self._upload(upload, chunks)
        except StoreUnavailable:
            # The server is away, and the key will expire.
            raise
        except BaseException:
            with suppress(StoreUnavailable):
                self._server.command("UNLINK", upload)
            raise

    def put_file(self, file: BinaryIO) -> str:
        """`put` of a file object read to its end."""
        return self.put(iter(lambda: file.read(CHUNK_BYTES), b""))

    def read(self, blob: str) -> Iterator[bytes]:
        """Stream the bytes; the last chunk is given only when all of them match the id.

        Raises:
            BlobMissing: absent (raised by the call itself), or deleted meanwhile or damaged (raised before
                the last chunk).
            StoreUnavailable: the server does not answer.
        """
        digest = hex_digest(blob)
        num_chunks = self._server.command("HGET", blob_key(digest), "chunks")
        if num_chunks is None:
            raise BlobMissing(f"there is no blob {blob}")
        return verified(blob, self._chunks(blob, int(num_chunks)))

    def read_bytes(self, blob: str) -> bytes:
        """All the bytes, verified. Raises BlobMissing, StoreUnavailable."""
        return b"".join(self.read(blob))

    def size(self, blob: str) -> int:
        """Number of bytes. Raises BlobMissing, StoreUnavailable."""
        digest = hex_digest(blob)
        size = self._server.command("HGET", blob_key(digest), "size")
        if size is None:
            raise BlobMissing(f"there is no blob {blob}")
        return int(size)

    def _upload(self, upload: str, chunks: Iterable[bytes]) -> str:
        digest = hashlib.sha256()
        num_bytes = num_chunks = 0
        for chunk in rechunked(chunks):
            digest.update(chunk)
            self._server.transaction(
                ("HSET", upload, num_chunks, chunk), ("PEXPIRE", upload, _UPLOAD_LIFE_MS)
            )
            num_bytes += len(chunk)
            num_chunks += 1
        final = digest.hexdigest()
        if not self._publish([upload, blob_key(final)], [num_bytes, num_chunks]):
            raise StoreUnavailable(
                "The Redis store lost part of an upload "
                "(it was restarted, or the upload paused for too long); try again",
                retry_after_s=1.0,
            )
        return blob_id(final)

    def _chunks(self, blob: str, num_chunks: int) -> Iterator[bytes]:
        key = blob_key(hex_digest(blob))
        for i in range(num_chunks):
            chunk: bytes | None = self._server.command("HGET", key, i)
            if chunk is None:
                raise BlobMissing(f"{blob} was deleted while it was being read, or is damaged")
            yield chunk
