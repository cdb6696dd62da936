"""One page of a list, as OpenAI's `after` and `limit` ask for it.

Knows records and their order; knows nothing of what they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from weft_server.errors import InvalidRequest
from weft_server.store.base import Record, RecordStore

Item = TypeVar("Item")
_SCAN_RECORDS = 200


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """Some items of a list, and whether more follow."""

    items: list[Item]
    has_more: bool


def scan_page(
    records: RecordStore,
    kind: str,
    tenant: str,
    *,
    after: str | None,
    limit: int,
    newest_first: bool = True,
    keep: Callable[[Record], bool] | None = None,
) -> Page[Record]:
    """Up to `limit` records after the one with id `after`, of those that `keep` keeps. Blocking.

    Raises:
        InvalidRequest: `after` names no such record.
    """
    found: list[Record] = []
    step = limit + 1 if keep is None else max(limit + 1, _SCAN_RECORDS)
    while True:
        try:
            batch = records.list(kind, tenant, after=after, limit=step, newest_first=newest_first)
        except KeyError:
            raise InvalidRequest(
                f"after is '{after}', which is not in the list; give the id of the last object received.",
                param="after",
            ) from None
        found += batch if keep is None else [record for record in batch if keep(record)]
        if len(found) > limit or len(batch) < step:
            return Page(found[:limit], has_more=len(found) > limit)
        after = batch[-1].id
