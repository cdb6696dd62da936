"""Requests that are sent twice and done once: which keys have been used, for what, and what it made.

Owns the record kind `idempotency_key`, whose record is created together with what the request makes, so that
of two equal requests at a time one alone succeeds. Blocking.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from weft_server.errors import Conflict
from weft_server.store.base import Change, Create, Delete, Record, RecordStore, StaleRecord, Update

IDEMPOTENCY_KIND = "idempotency_key"
KEPT_S = 24 * 3600.0
"""A key may be used for another request after a day."""

_SWEPT_AT_A_TIME = 16


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """The caller's key for one request of an operation, and a digest that is equal for equal bodies."""

    operation: str
    key: str
    body_digest: str

    @property
    def record_id(self) -> str:
        """Of bounded length, whatever the key."""
        return hashlib.sha256(f"{self.operation}\0{self.key}".encode()).hexdigest()


class IdempotencyTable:
    """Every method may raise StoreUnavailable."""

    def __init__(self, records: RecordStore) -> None:
        self._records = records

    def find(self, tenant: str, key: IdempotencyKey) -> str | None:
        """The id of what the tenant's request of this key made; None if there was none within a day.

        Raises:
            Conflict: it had another body.
        """
        record = self._records.get(IDEMPOTENCY_KIND, tenant, key.record_id)
        if record is None or self._has_expired(record):
            return None
        if record.value["body_digest"] != key.body_digest:
            raise Conflict(
                f"The Idempotency-Key '{key.key}' was used within 24 hours for a request with another body. "
                "Use a new key for a new request.",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        return str(record.value["object_id"])

    def claim(self, tenant: str, key: IdempotencyKey, object_id: str) -> Change:
        """The change that takes the key for an object, to be applied together with the object's creation.

        It fails the creation with StaleRecord if another request takes the key meanwhile.
        """
        value: dict[str, Any] = {
            "body_digest": key.body_digest,
            "object_id": object_id,
            "created_at": self._records.now(),
        }
        record = self._records.get(IDEMPOTENCY_KIND, tenant, key.record_id)
        if record is not None and self._has_expired(record):
            return Update(record, value)
        return Create(IDEMPOTENCY_KIND, tenant, key.record_id, value)

    def forget_expired(self, tenant: str) -> None:
        """Delete a few of the tenant's oldest keys, those that have expired."""
        oldest = self._records.list(IDEMPOTENCY_KIND, tenant, newest_first=False, limit=_SWEPT_AT_A_TIME)
        for record in oldest:
            if self._has_expired(record):
                with suppress(StaleRecord):
                    self._records.apply([Delete(record)])

    def _has_expired(self, record: Record) -> bool:
        return bool(self._records.now() - record.value["created_at"] >= KEPT_S)
