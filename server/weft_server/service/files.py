"""Uploaded files: a record beside a blob.

Owns the record kind `file` and the blob links `file:{id}`. A finetune job links the bytes that it reads
itself, so a file may be deleted at any time. Knows nothing of what a file holds, nor of HTTP.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from weft_server.errors import Internal, InvalidRequest, NotFound
from weft_server.service.pages import Page, scan_page
from weft_server.store.base import (
    BlobMissing,
    BlobStore,
    Create,
    Delete,
    Link,
    Record,
    RecordStore,
    StaleRecord,
    Unlink,
)

FILE_KIND = "file"
PURPOSES = ("fine-tune",)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One uploaded file; `created_at` in seconds since the epoch."""

    id: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: int
    blob: str

    def to_value(self) -> dict[str, Any]:
        """As stored in the record."""
        return {
            "filename": self.filename,
            "purpose": self.purpose,
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "blob": self.blob,
        }

    @classmethod
    def from_record(cls, record: Record) -> StoredFile:
        """From the record."""
        value = record.value
        return cls(
            id=record.id,
            filename=value["filename"],
            purpose=value["purpose"],
            num_bytes=value["bytes"],
            created_at=value["created_at"],
            blob=value["blob"],
        )


def check_purpose(purpose: str) -> None:
    """Refuse a purpose that nothing here would act on.

    Raises:
        InvalidRequest: naming the allowed ones.
    """
    if purpose not in PURPOSES:
        raise InvalidRequest(
            f"purpose is '{purpose}'; it must be one of: {', '.join(PURPOSES)}.", param="purpose"
        )


class FileService:
    """Upload, list, read and delete a tenant's files."""

    def __init__(self, records: RecordStore, blobs: BlobStore) -> None:
        self._records = records
        self._blobs = blobs

    async def upload(self, tenant: str, *, filename: str, purpose: str, content: BinaryIO) -> StoredFile:
        """Store a file, read from `content` to its end; durable when this returns.

        Raises:
            InvalidRequest: an unknown purpose, or an empty file.
            StoreUnavailable: the store does not answer or is full.
        """
        check_purpose(purpose)
        return await asyncio.to_thread(self._upload, tenant, filename, purpose, content)

    async def list(
        self,
        tenant: str,
        *,
        after: str | None = None,
        limit: int = 10_000,
        newest_first: bool = True,
        purpose: str | None = None,
    ) -> Page[StoredFile]:
        """The tenant's files in order of creation.

        Raises:
            InvalidRequest: `after` is not one of them.
        """

        def keep(record: Record) -> bool:
            return bool(record.value["purpose"] == purpose)

        page = await asyncio.to_thread(
            scan_page,
            self._records,
            FILE_KIND,
            tenant,
            after=after,
            limit=limit,
            newest_first=newest_first,
            keep=None if purpose is None else keep,
        )
        return Page([StoredFile.from_record(record) for record in page.items], page.has_more)

    async def get(self, tenant: str, file_id: str) -> StoredFile:
        """One file.

        Raises:
            NotFound: absent, or another tenant's.
        """
        return StoredFile.from_record(await self._record(tenant, file_id))

    async def content(self, tenant: str, file_id: str) -> tuple[StoredFile, Iterator[bytes]]:
        """The file and its bytes, verified while they are read; consume the iterator in a thread.

        Raises:
            NotFound: absent, or another tenant's.
            Internal: the bytes are gone from the store.
        """
        file = await self.get(tenant, file_id)
        return file, await asyncio.to_thread(open_blob, self._blobs, file.blob)

    async def delete(self, tenant: str, file_id: str) -> None:
        """Forget a file; unfinished jobs that read it keep its bytes.

        Raises:
            NotFound: absent, or another tenant's.
        """
        while True:
            record = await self._record(tenant, file_id)
            changes = (Delete(record), Unlink(record.value["blob"], _owner(file_id)))
            try:
                await asyncio.to_thread(self._records.apply, changes)
            except StaleRecord:
                continue
            return

    def _upload(self, tenant: str, filename: str, purpose: str, content: BinaryIO) -> StoredFile:
        blob = self._blobs.put_file(content)
        num_bytes = self._blobs.size(blob)
        if num_bytes == 0:
            raise InvalidRequest("The uploaded file is empty.", param="file", code="empty_file")
        file = StoredFile(
            id=f"file-{secrets.token_hex(12)}",
            filename=filename,
            purpose=purpose,
            num_bytes=num_bytes,
            created_at=int(self._records.now()),
            blob=blob,
        )
        self._records.apply(
            [Create(FILE_KIND, tenant, file.id, file.to_value()), Link(blob, _owner(file.id))]
        )
        return file

    async def _record(self, tenant: str, file_id: str) -> Record:
        record = await asyncio.to_thread(self._records.get, FILE_KIND, tenant, file_id)
        if record is None:
            raise file_not_found(file_id, param="id")
        return record


def file_not_found(file_id: str, *, param: str) -> NotFound:
    """404 for a file that is absent or another tenant's."""
    return NotFound(f"No such file: '{file_id}'.", param=param, code="file_not_found")


def open_blob(blobs: BlobStore, blob: str) -> Iterator[bytes]:
    """A blob's bytes, its first chunk already read, so that a missing one is known before a response begins.

    Raises:
        Internal: the bytes are gone from the store.
    """
    try:
        chunks = blobs.read(blob)
        first = next(chunks, b"")
    except BlobMissing:
        raise Internal("The stored bytes are missing or damaged; upload the object again.") from None

    def rest() -> Iterator[bytes]:
        yield first
        yield from chunks

    return rest()


def _owner(file_id: str) -> str:
    return f"file:{file_id}"
