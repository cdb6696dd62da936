"""Keys that make a request happen once, on every store."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from weft_server.errors import Conflict
from weft_server.service.idempotency import IDEMPOTENCY_KIND, KEPT_S, IdempotencyKey, IdempotencyTable
from weft_server.store.base import Create, RecordStore, StaleRecord
from weft_server.store.opening import Store, open_store

KEY = IdempotencyKey("fine_tuning.job", "order-7", "digest-a")
OTHER_BODY = IdempotencyKey("fine_tuning.job", "order-7", "digest-b")


def make(records: RecordStore, object_id: str, key: IdempotencyKey = KEY, tenant: str = "t") -> None:
    """Create an object under a key, as a service does."""
    claim = IdempotencyTable(records).claim(tenant, key, object_id)
    records.apply([Create("thing", tenant, object_id, {}), claim])


class LaterStore:
    """A store at another time."""

    def __init__(self, records: RecordStore, seconds: float) -> None:
        self._records = records
        self._seconds = seconds

    def now(self) -> float:
        return self._records.now() + self._seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._records, name)


def test_a_key_leads_to_what_its_request_made(store: Store, store_url: str, tmp_path: Path) -> None:
    table = IdempotencyTable(store.records)
    assert table.find("t", KEY) is None
    make(store.records, "one")
    assert table.find("t", KEY) == "one"
    assert table.find("other", KEY) is None, "keys are a tenant's own"
    assert table.find("t", IdempotencyKey("other", "order-7", "digest-a")) is None
    with pytest.raises(Conflict) as caught:
        table.find("t", OTHER_BODY)
    assert caught.value.code == "idempotency_key_reused"


def test_a_key_survives_the_store(store_url: str, tmp_path: Path) -> None:
    with open_store(store_url, tmp_path) as store:
        make(store.records, "one")
    with open_store(store_url, tmp_path) as store:
        assert IdempotencyTable(store.records).find("t", KEY) == "one"


def test_of_many_at_a_time_one_succeeds_and_all_learn_which(store: Store) -> None:
    records = store.records
    start = threading.Barrier(8)

    def attempt(idx: int) -> str | None:
        start.wait()
        with suppress(StaleRecord):
            make(records, f"thing{idx}")
        return IdempotencyTable(records).find("t", KEY)

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(attempt, range(8)))
    made = records.list("thing", "t")
    assert found == {record.id for record in made}
    assert len(made) == 1


def test_after_a_day_a_key_is_free_again_and_forgotten(store: Store) -> None:
    make(store.records, "one")
    make(store.records, "two", IdempotencyKey("fine_tuning.job", "order-8", "digest-a"))
    almost, later = (LaterStore(store.records, seconds) for seconds in (KEPT_S - 60, KEPT_S + 60))
    assert IdempotencyTable(almost).find("t", KEY) == "one"
    assert IdempotencyTable(later).find("t", OTHER_BODY) is None
    make(later, "three", OTHER_BODY)
    assert IdempotencyTable(later).find("t", OTHER_BODY) == "three"
    IdempotencyTable(later).forget_expired("t")
    assert len(store.records.list(IDEMPOTENCY_KIND, "t")) == 1
