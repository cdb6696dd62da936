"""Records, events and counters: the same behaviour of every store."""

from __future__ import annotations

import dataclasses
import time
import uuid
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft_server.store.base import (
    Append,
    Create,
    Delete,
    Event,
    Record,
    RecordStore,
    StaleRecord,
    Update,
)
from weft_server.store.opening import Store


@pytest.fixture
def records(store: Store) -> RecordStore:
    return store.records


def create(records: RecordStore, id_: str, tenant: str = "t", kind: str = "job", **value: Any) -> Record:
    (record,) = records.apply([Create(kind, tenant, id_, value)])
    return record


def ids(records: list[Record]) -> list[str]:
    return [record.id for record in records]


def test_a_created_record_is_found_at_version_one(records: RecordStore) -> None:
    record = create(records, "a", x=1)
    assert record == Record("job", "t", "a", {"x": 1}, version=1, seq=record.seq)
    assert records.get("job", "t", "a") == record


@pytest.mark.parametrize("key", [("file", "t", "a"), ("job", "u", "a"), ("job", "t", "b")])
def test_a_record_is_found_only_under_its_kind_tenant_and_id(
    records: RecordStore, key: tuple[str, str, str]
) -> None:
    create(records, "a")
    assert records.get(*key) is None


def test_creating_a_record_that_exists_is_stale(records: RecordStore) -> None:
    first = create(records, "a", x=1)
    with pytest.raises(StaleRecord):
        create(records, "a", x=2)
    assert records.get("job", "t", "a") == first


def test_an_update_raises_the_version_and_keeps_the_place(records: RecordStore) -> None:
    first = create(records, "a", x=1)
    (second,) = records.apply([Update(first, {"x": 2})])
    assert second == dataclasses.replace(first, value={"x": 2}, version=2)
    assert records.get("job", "t", "a") == second


def test_updating_an_old_version_is_stale(records: RecordStore) -> None:
    first = create(records, "a")
    (second,) = records.apply([Update(first, {"x": 2})])
    with pytest.raises(StaleRecord):
        records.apply([Update(first, {"x": 3})])
    assert records.get("job", "t", "a") == second


def test_deleting_an_old_version_is_stale(records: RecordStore) -> None:
    first = create(records, "a")
    (second,) = records.apply([Update(first, {"x": 2})])
    with pytest.raises(StaleRecord):
        records.apply([Delete(first)])
    records.apply([Delete(second)])
    assert records.get("job", "t", "a") is None
    assert records.list("job", "t") == records.list("job", None) == []


def test_a_record_created_anew_is_not_the_deleted_one(records: RecordStore) -> None:
    old = create(records, "a")
    records.apply([Delete(old)])
    new = create(records, "a")
    assert (new.version, new.seq > old.seq) == (1, True)
    with pytest.raises(StaleRecord):
        records.apply([Update(old, {"x": 1})])


def test_changes_of_one_apply_happen_in_order(records: RecordStore) -> None:
    old = create(records, "a", x=1)
    (new,) = records.apply([Delete(old), Create("job", "t", "a", {"x": 2})])
    assert records.get("job", "t", "a") == new
    with pytest.raises(StaleRecord):
        records.apply([Update(new, {"x": 3}), Update(new, {"x": 4})])
    with pytest.raises(StaleRecord):
        records.apply([Create("job", "t", "b", {}), Create("job", "t", "b", {})])
    with pytest.raises(StaleRecord):
        records.apply([Delete(new), Update(new, {})])
    assert records.list("job", "t") == [new]


def test_a_lost_compare_and_set_applies_nothing(records: RecordStore) -> None:
    first = create(records, "a", x=1)
    other = create(records, "b", x=1)
    records.apply([Update(first, {"x": 2})])
    with pytest.raises(StaleRecord):
        records.apply(
            [
                Create("job", "t", "c", {}),
                Append("log", {"x": 1}),
                Delete(other),
                Update(first, {"x": 3}),
            ]
        )
    assert ids(records.list("job", "t")) == ["b", "a"]
    assert records.events("log") == []


def test_apply_returns_what_was_written_in_order(records: RecordStore) -> None:
    first = create(records, "a")
    changed = records.apply(
        [
            Create("job", "t", "b", {"n": 1}),
            Append("log", {}),
            Update(first, {"n": 2}),
            Create("job", "t", "c", {}),
        ]
    )
    assert [(record.id, record.version) for record in changed] == [("b", 1), ("a", 2), ("c", 1)]
    assert [records.get("job", "t", record.id) for record in changed] == changed


def test_an_empty_apply_changes_nothing(records: RecordStore) -> None:
    assert records.apply([]) == []


def test_listing_is_in_creation_order_whatever_was_updated_since(records: RecordStore) -> None:
    made = [create(records, name) for name in "bca"]
    records.apply([Update(made[0], {"x": 1})])
    assert ids(records.list("job", "t")) == ["a", "c", "b"]
    assert ids(records.list("job", "t", newest_first=False)) == ["b", "c", "a"]


def test_listing_goes_on_after_an_id(records: RecordStore) -> None:
    for name in "abcdef":
        create(records, name)
        create(records, name, tenant="other")
    assert ids(records.list("job", "t", after="d", limit=2)) == ["c", "b"]
    assert ids(records.list("job", "t", after="d", limit=2, newest_first=False)) == ["e", "f"]
    assert ids(records.list("job", "t", after="a")) == []
    assert ids(records.list("job", "t", limit=2)) == ["f", "e"]
    assert records.list("job", "t", limit=0) == []


def test_listing_all_tenants_is_in_creation_order_too(records: RecordStore) -> None:
    create(records, "a", tenant="t")
    create(records, "b", tenant="u")
    create(records, "c", tenant="t")
    create(records, "d", kind="file")
    assert [(r.tenant, r.id) for r in records.list("job", None)] == [("t", "c"), ("u", "b"), ("t", "a")]
    assert ids(records.list("job", None, after="b")) == ["a"]
    assert ids(records.list("job", None, after="b", newest_first=False)) == ["c"]


def test_listing_after_an_unknown_or_ambiguous_id_is_refused(records: RecordStore) -> None:
    create(records, "a", tenant="u")
    with pytest.raises(KeyError):
        records.list("job", "t", after="a")
    with pytest.raises(KeyError):
        records.list("file", None, after="a")
    create(records, "a", tenant="t")
    with pytest.raises(KeyError):
        records.list("job", None, after="a")


def test_a_negative_limit_is_refused(records: RecordStore) -> None:
    with pytest.raises(ValueError, match="limit"):
        records.list("job", "t", limit=-1)
    with pytest.raises(ValueError, match="limit"):
        records.events("log", limit=-1)


ODD_NAMES = [
    "",
    ":",
    "a:b",
    "a",
    "%3A",
    "a%",
    "ünïcødé",
    "名前",
    " ",
    "a b",
    "*",
    "a\x00b",
    "a\nb",
    "x" * 2000,
]


def test_odd_names_do_not_collide(records: RecordStore) -> None:
    keys = [(tenant, id_) for tenant in ODD_NAMES for id_ in ODD_NAMES]
    records.apply([Create("k:ind", tenant, id_, {"key": [tenant, id_]}) for tenant, id_ in keys])
    assert [(r.tenant, r.id) for r in records.list("k:ind", None, newest_first=False)] == keys
    for tenant, id_ in keys:
        record = records.get("k:ind", tenant, id_)
        assert record is not None
        assert record.value == {"key": [tenant, id_]}
    assert ids(records.list("k:ind", "a:b", newest_first=False, after="%3A")) == ODD_NAMES[5:]


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": None, "b": True, "c": [1, [2, {"d": ""}]], "": {}},
        {"unicode": "naïve 🧵 \u2028", "surrogate": "\ud800", "nul": "\x00", "quote": "\"'\\"},
        {"float": 0.1 + 0.2, "tiny": 5e-324, "big": 1.7976931348623157e308, "negative zero": -0.0},
        {"int": 2**70, "max": 2**63 - 1, "min": -(2**63)},
        {"long": "x" * 3_000_000},
    ],
    ids=["empty", "nested", "text", "float", "int", "long"],
)
def test_values_come_back_exactly(records: RecordStore, value: dict[str, Any]) -> None:
    create(records, "a", **value)
    records.apply([Append("log", value)])
    record = records.get("job", "t", "a")
    assert record is not None
    assert repr(record.value) == repr(value)
    assert repr(records.events("log")) == repr([Event(1, value)])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_value_that_json_lacks_is_refused(records: RecordStore, number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        records.apply([Create("job", "t", "a", {"x": number})])
    assert records.get("job", "t", "a") is None


def test_changing_a_returned_value_changes_nothing_stored(records: RecordStore) -> None:
    value = {"list": [1]}
    (made,) = records.apply([Create("job", "t", "a", value)])
    value["list"].append(2)
    made.value["list"].append(3)
    found = records.get("job", "t", "a")
    assert found is not None
    assert found.value == {"list": [1]}


def test_events_are_numbered_from_one_in_each_stream(records: RecordStore) -> None:
    records.apply([Append("a", {"n": 1}), Append("b", {"n": 2}), Append("a", {"n": 3})])
    assert records.events("a") == [Event(1, {"n": 1}), Event(2, {"n": 3})]
    assert records.events("b") == [Event(1, {"n": 2})]
    assert records.events("c") == []


def test_events_can_be_paged_from_either_end(records: RecordStore) -> None:
    records.apply([Append("a", {}) for _ in range(9)])

    def seqs(**options: Any) -> list[int]:
        return [event.seq for event in records.events("a", **options)]

    assert seqs(after=4) == [5, 6, 7, 8, 9]
    assert seqs(after=4, limit=2) == [5, 6]
    assert seqs(after=9) == seqs(after=100) == seqs(limit=0) == []
    assert seqs(newest_first=True, limit=3) == [9, 8, 7]
    assert seqs(newest_first=True, after=7, limit=3) == [6, 5, 4]
    assert seqs(newest_first=True, after=3) == [2, 1]
    assert seqs(newest_first=True, after=1) == []
    assert seqs(newest_first=True, after=100, limit=1) == [9]


def test_a_forgotten_stream_begins_again(records: RecordStore) -> None:
    records.apply([Append("a", {"n": 1}), Append("b", {"n": 2})])
    records.delete_stream("a")
    records.delete_stream("never written")
    assert records.events("a") == []
    records.apply([Append("a", {"n": 3})])
    assert records.events("a") == [Event(1, {"n": 3})]
    assert records.events("b") == [Event(1, {"n": 2})]


def test_counters_count_from_one_and_apart(records: RecordStore) -> None:
    assert [records.next_number("a") for _ in range(3)] == [1, 2, 3]
    assert records.next_number("b") == 1


def test_now_is_the_time(records: RecordStore) -> None:
    before = time.time()
    now = records.now()
    assert before - 1 <= now <= time.time() + 1


_NAMES = st.sampled_from("abc")
_CHANGES = st.lists(
    st.lists(
        st.tuples(st.sampled_from(["create", "update", "delete", "stale", "append"]), _NAMES),
        min_size=1,
        max_size=4,
    ),
    max_size=12,
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(batches=_CHANGES)
def test_any_sequence_of_changes_agrees_with_a_dictionary(
    records: RecordStore, batches: list[list[tuple[str, str]]]
) -> None:
    kind = uuid.uuid4().hex
    model: dict[str, Record] = {}
    log: list[int] = []
    for n, batch in enumerate(batches):
        model = _apply_and_compare(records, kind, n, batch, model, log)
    expected = sorted(model.values(), key=lambda record: record.seq)
    assert records.list(kind, "t", newest_first=False) == expected
    assert [event.value["n"] for event in records.events(kind)] == log


def _apply_and_compare(
    records: RecordStore,
    kind: str,
    n: int,
    batch: list[tuple[str, str]],
    model: dict[str, Record],
    log: list[int],
) -> dict[str, Record]:
    """Apply one batch to the store and to the model, which must agree on staleness; returns the model."""
    absent = Record(kind, "t", "absent", {}, 1, 1)
    changes: list[Any] = []
    versions = {name: record.version for name, record in model.items()}
    is_stale = False
    for what, name in batch:
        old = model.get(name, dataclasses.replace(absent, id=name))
        match what:
            case "create":
                changes.append(Create(kind, "t", name, {"n": n}))
                is_stale |= name in versions
                versions[name] = 0
            case "update":
                changes.append(Update(old, {"n": n}))
                is_stale |= name not in model or versions.get(name) != old.version
                versions[name] = old.version + 1
            case "delete":
                changes.append(Delete(old))
                is_stale |= name not in model or versions.pop(name, None) != old.version
            case "stale":
                changes.append(Update(dataclasses.replace(old, version=old.version + 7), {}))
                is_stale = True
            case _:
                changes.append(Append(kind, {"n": n}))
    if is_stale:
        with pytest.raises(StaleRecord):
            records.apply(changes)
        return model
    written = {record.id: record for record in records.apply(changes)}
    log += [n for what, _ in batch if what == "append"]
    return {name: written.get(name) or model[name] for name in versions}
