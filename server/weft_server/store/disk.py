"""Blobs as files of one directory, durable once acknowledged. Knows nothing of records or links.

    <root>/<first two hex digits>/<64 hex digits>    a complete blob
    <root>/tmp/<random>                              a blob being written, or left behind by a crash

A blob is written to `tmp`, flushed to the device, renamed into place, and the directories are flushed, in
this order; so a name in a shard always stands for complete bytes. Several processes may use one root at the
same time. A file's modification time is when the blob was last put.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from weft_server.store.base import BlobMissing, StoreUnavailable
from weft_server.store.digest import CHUNK_BYTES, blob_id, hex_digest, is_hex_digest, verified

_NO_SPACE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
}


def file_unavailable(action: str, path: Path, error: OSError) -> StoreUnavailable:
    """The error to raise when the operating system refuses a file operation of the store."""
    if (reason := _NO_SPACE.get(error.errno or 0)) is not None:
        message = f"cannot {action} {path}: {reason}; make room or choose another --data-dir"
    else:
        message = f"cannot {action} {path}: {error.strerror or error}"
    return StoreUnavailable(message, retry_after_s=5.0)


@contextmanager
def _file_errors(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise file_unavailable(action, path, error) from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Create a directory and its parents durably; existing ones are left as they are.

    Raises:
        StoreUnavailable: it cannot be created, or something else has its name.
    """
    with _file_errors("create directory", path):
        if path.is_dir():
            return
        if not path.parent.exists():
            make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def _written_before(path: Path, deadline_ns: int) -> bool:
    try:
        return path.stat().st_mtime_ns < deadline_ns
    except FileNotFoundError:
        return False


class DiskBlobStore:
    """A `BlobStore` on a directory, which is created if absent."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tmp = root / "tmp"
        make_directory(self._tmp)

    def put(self, chunks: Iterable[bytes]) -> str:
        """Store a stream; returns its id. What `chunks` raises passes through, and nothing is stored.

        Raises:
            StoreUnavailable: the disk is full or refuses.
        """
        temp = self._tmp / uuid.uuid4().hex
        try:
            digest = self._write(temp, chunks)
            self._publish(temp, digest)
        except BaseException:
            with suppress(OSError):
                temp.unlink()
            raise
        return blob_id(digest)

    def put_file(self, file: BinaryIO) -> str:
        """`put` of a file object read to its end."""
        return self.put(iter(lambda: file.read(CHUNK_BYTES), b""))

    def read(self, blob: str) -> Iterator[bytes]:
        """Stream the bytes; the last chunk is given only when all of them match the id.

        Raises:
            BlobMissing: absent (raised by the call itself), or damaged (raised before the last chunk).
            StoreUnavailable: the disk refuses.
        """
        self.size(blob)
        return verified(blob, self._chunks(blob))

    def read_bytes(self, blob: str) -> bytes:
        """All the bytes, verified. Raises BlobMissing, StoreUnavailable."""
        return b"".join(self.read(blob))

    def size(self, blob: str) -> int:
        """Number of bytes. Raises BlobMissing, StoreUnavailable."""
        return self._stat(blob).st_size

    def put_at_ns(self, blob: str) -> int:
        """When the blob was last put, nanoseconds since the epoch. Raises BlobMissing, StoreUnavailable."""
        return self._stat(blob).st_mtime_ns

    def delete(self, blob: str) -> None:
        """Remove a blob; an absent one is not an error. A crash may bring it back, never half of it."""
        path = self._path(blob)
        with _file_errors("delete", path):
            path.unlink(missing_ok=True)

    def put_before(self, deadline_ns: int) -> Iterator[str]:
        """Ids of the blobs last put before `deadline_ns` (nanoseconds since the epoch), in no order."""
        with _file_errors("read", self.root):
            shards = [path for path in self.root.iterdir() if path != self._tmp and path.is_dir()]
            for shard in shards:
                for path in shard.iterdir():
                    if is_hex_digest(path.name) and _written_before(path, deadline_ns):
                        yield blob_id(path.name)

    def delete_temporary(self, deadline_ns: int) -> None:
        """Remove what interrupted puts left behind, if last written before `deadline_ns`."""
        with _file_errors("clean", self._tmp):
            for path in self._tmp.iterdir():
                if _written_before(path, deadline_ns):
                    path.unlink(missing_ok=True)

    def _path(self, blob: str) -> Path:
        digest = hex_digest(blob)
        return self.root / digest[:2] / digest

    def _stat(self, blob: str) -> os.stat_result:
        path = self._path(blob)
        try:
            return path.stat()
        except FileNotFoundError as error:
            raise BlobMissing(f"there is no blob {blob}") from error
        except OSError as error:
            raise file_unavailable("read", path, error) from error

    def _chunks(self, blob: str) -> Iterator[bytes]:
        path = self._path(blob)
        try:
            with path.open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except FileNotFoundError as error:
            raise BlobMissing(f"there is no blob {blob}") from error
        except OSError as error:
            raise file_unavailable("read", path, error) from error

    def _write(self, temp: Path, chunks: Iterable[bytes]) -> str:
        """Write and flush; returns the hex digest. Only our own file's errors become StoreUnavailable."""
        digest = hashlib.sha256()
        with _file_errors("create", temp):
            file = temp.open("xb")
        try:
            for chunk in chunks:
                digest.update(chunk)
                with _file_errors("write", temp):
                    file.write(chunk)
            with _file_errors("write", temp):
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            # Closing flushes again, which may fail again for the reason that is already being raised.
            with suppress(OSError):
                file.close()
            raise
        with _file_errors("write", temp):
            file.close()
        return digest.hexdigest()

    def _publish(self, temp: Path, digest: str) -> None:
        """Rename into place, also over an older copy: if that one was damaged, it is healed."""
        final = self.root / digest[:2] / digest
        with _file_errors("write", final):
            now_ns = time.time_ns()
            os.utime(temp, ns=(now_ns, now_ns))
            final.parent.mkdir(exist_ok=True)
            temp.replace(final)
            sync_directory(final.parent)
            # Always: whoever created the shard may not have flushed its name yet.
            sync_directory(self.root)
