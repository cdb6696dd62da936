"""Adapter residency: pins hold, the least valuable leaves, reservations end starvation, jobs cannot fragment
requests.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weft_scheduler.entries import AdapterState
from weft_scheduler.requests import RequestTooLarge
from weft_scheduler.residency import PIN_RETRY_S, Residency

UNIT = 64
KEYS = [f"a{idx}" for idx in range(6)]
JOBS = [f"job:{idx}" for idx in range(3)]
SIZES = {key: UNIT * (1 + idx % 4) for idx, key in enumerate(KEYS)} | dict.fromkeys(JOBS, 2 * UNIT)


class ResidencyMachine(RuleBasedStateMachine):
    """Random demand and news; a model of the device checks every action."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency(8, 16 * UNIT, 0.5, pinned_share=0.125)
        self.now = 0.0
        self.waiting = dict.fromkeys(KEYS, 0)
        self.users: dict[str, list[int]] = {key: [] for key in KEYS}
        self.jobs: set[str] = set()
        self.slots: dict[int, str] = {}
        self.extents: dict[int, range] = {}
        self.loading: list[str] = []
        self.fetching: list[str] = []
        self.fences = dict.fromkeys(KEYS, 0)
        self.committed = 0
        self.settled: set[str] = set()

    @rule(key=st.sampled_from(KEYS), is_known=st.booleans())
    def want(self, key: str, is_known: bool) -> None:
        self.residency.want(key, SIZES[key] if is_known else 0)
        self.waiting[key] += 1

    @rule(key=st.sampled_from(KEYS))
    def unwant(self, key: str) -> None:
        if self.waiting[key]:
            self.residency.unwant(key)
            self.waiting[key] -= 1

    @rule(key=st.sampled_from(JOBS))
    def add_job(self, key: str) -> None:
        if key not in self.jobs:
            self.residency.want(key, SIZES[key], is_training=True)
            self.jobs.add(key)

    @rule(key=st.sampled_from(JOBS), ahead=st.integers(0, 2))
    def remove_job(self, key: str, ahead: int) -> None:
        self.residency.remove(key, self.committed + ahead)
        self.jobs.discard(key)

    @rule(key=st.sampled_from(KEYS))
    def acquire(self, key: str) -> None:
        if self.waiting[key] and self.residency.is_admitting(key):
            slot = self.residency.acquire(key)
            assert self.slots[slot] == key
            self.waiting[key] -= 1
            self.users[key].append(slot)

    @rule(key=st.sampled_from(KEYS), ahead=st.integers(0, 2))
    def release(self, key: str, ahead: int) -> None:
        if self.users[key]:
            self.users[key].pop()
            self.residency.release(key, self.committed + ahead)
            self.fences[key] = max(self.fences[key], self.committed + ahead)

    @precondition(lambda self: self.fetching)
    @rule(is_lost=st.booleans())
    def fetch_ends(self, is_lost: bool) -> None:
        key = self.fetching.pop(0)
        if is_lost and key in KEYS:
            self.residency.failed(key)
        else:
            entry = self.residency.entries.get(key)
            is_only_pinned = entry is not None and entry.is_pinned and not entry.num_waiting
            refusal = self.residency.fetched(key, SIZES[key])
            assert refusal is None or is_only_pinned
            if refusal is not None:
                self.residency.failed(key)

    @precondition(lambda self: self.loading)
    @rule(is_lost=st.booleans())
    def load_ends(self, is_lost: bool) -> None:
        key = self.loading.pop(0)
        if is_lost and key in KEYS:
            assert self.residency.failed(key)
            self._vacate(key)
        else:
            self.residency.loaded(key)

    @rule(is_aged=st.booleans(), by=st.integers(0, 2))
    def plan(self, is_aged: bool, by: int) -> None:
        self.now += 0.1
        self.committed += by
        self.residency.advance(self.now, self.committed)
        self.residency.finish_reservations()
        self.residency.settle_pins()
        for entry in list(self.residency.missing.values()):
            if entry.state is AdapterState.ABSENT and self.residency.staging.try_open_for(entry):
                self.residency.fetch(entry)
            elif (
                entry.state is AdapterState.HOST
                and not self.residency.try_load(entry, is_aged=is_aged)
                and is_aged
            ):
                self.residency.try_reserve(entry, lambda key: len(self.users.get(key, ())))
        actions = self.residency.take_actions()
        protected = set(self.residency.pins.granted) & self.settled
        for key, slot in actions.evictions:
            assert self.slots[slot] == key
            assert key not in protected, "a pinned adapter in its place is evicted"
            assert key not in self.jobs or key in JOBS
            assert not self.users.get(key)
            assert self.fences.get(key, 0) <= self.committed
            self._vacate(key)
        for move in actions.moves:
            assert self.slots[move.slot] == move.adapter
            assert not self.users.get(move.adapter)
            assert self.fences.get(move.adapter, 0) <= self.committed
            assert move.adapter not in self.loading
            assert self.extents.pop(move.slot).start == move.source
            place = range(move.destination, move.destination + move.num_elements)
            assert self._is_free(place)
            self.extents[move.slot] = place
        for load in actions.loads:
            place = range(load.offset, load.offset + load.num_elements)
            assert load.slot not in self.slots
            assert place.stop <= 16 * UNIT
            assert self._is_free(place)
            assert load.adapter not in JOBS or place.start >= 8 * UNIT
            self.slots[load.slot] = load.adapter
            self.extents[load.slot] = place
            self.loading.append(load.adapter)
        self.fetching.extend(actions.fetches)
        pinned_region = range(6 * UNIT, 8 * UNIT + 1)
        self.settled = {
            self.slots[slot]
            for slot, place in self.extents.items()
            if place.start in pinned_region and place.stop in pinned_region
        }

    @invariant()
    def is_consistent(self) -> None:
        self.residency.check_invariants()

    @rule(key=st.sampled_from(KEYS), is_pinned=st.booleans())
    def pin(self, key: str, is_pinned: bool) -> None:
        if is_pinned:
            self.residency.pin(key)
        else:
            self.residency.unpin(key)

    def _is_free(self, place: range) -> bool:
        return all(place.stop <= other.start or other.stop <= place.start for other in self.extents.values())

    def _vacate(self, key: str) -> None:
        slot = next(slot for slot, other in self.slots.items() if other == key)
        del self.slots[slot]
        del self.extents[slot]


TestResidencyMachine = ResidencyMachine.TestCase
TestResidencyMachine.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)


def bring(residency: Residency, key: str, num_elements: int, *, is_aged: bool = False) -> bool:
    """Want an adapter and take it through fetch and load; False if there is no room."""
    if key not in residency.entries:
        residency.want(key, num_elements, is_training=key.startswith("job:"))
        residency.fetch(residency.entries[key])
        residency.fetched(key, num_elements)
    if not residency.try_load(residency.entries[key], is_aged=is_aged):
        return False
    residency.loaded(key)
    return True


def use_once(residency: Residency, key: str, now_s: float) -> None:
    residency.advance(now_s, 0)
    residency.acquire(key)
    residency.release(key, fence=0)


def test_evicting_an_adapter_in_use_is_refused() -> None:
    residency = Residency(4, 4 * UNIT, 0.0)
    assert bring(residency, "a", 4 * UNIT)
    residency.acquire("a")
    assert not bring(residency, "b", UNIT, is_aged=True)
    residency.release("a", fence=3)
    residency.advance(1.0, committed=2)
    assert not bring(residency, "b", UNIT, is_aged=True)
    residency.advance(1.0, committed=3)
    assert bring(residency, "b", UNIT, is_aged=True)
    assert residency.take_actions().evictions == (("a", 0),)


def test_the_adapter_that_has_been_idle_longest_is_evicted() -> None:
    residency = Residency(3, 3 * UNIT, 0.0)
    for now_s, key in enumerate(("a", "b", "c")):
        assert bring(residency, key, UNIT)
        use_once(residency, key, float(now_s))
    use_once_again = residency.entries["a"]
    residency.want("a", UNIT)
    use_once(residency, "a", 3.0)
    residency.advance(4.0, 0)
    assert bring(residency, "d", UNIT)
    assert residency.take_actions().evictions == (("b", 1),)
    assert use_once_again.state is AdapterState.DEVICE


def test_of_two_equally_idle_adapters_the_one_that_is_cheaper_to_reload_is_evicted() -> None:
    big, small = 1 << 22, 1 << 12
    residency = Residency(2, big + small, 0.0)
    assert bring(residency, "big", big)
    assert bring(residency, "small", small)
    use_once(residency, "big", 1.0)
    use_once(residency, "small", 1.0)
    residency.advance(2.0, 0)
    assert bring(residency, "new", small)
    assert [key for key, _ in residency.take_actions().evictions] == ["small"]


def test_an_adapter_with_waiters_is_evicted_for_overdue_ones_only_and_never_before_its_first_use() -> None:
    residency = Residency(2, 2 * UNIT, 0.0)
    assert bring(residency, "a", 2 * UNIT)
    assert not bring(residency, "b", UNIT, is_aged=True)
    residency.want("a", 2 * UNIT)
    use_once(residency, "a", 1.0)
    assert not bring(residency, "b", UNIT)
    assert bring(residency, "b", UNIT, is_aged=True)


def test_a_reservation_stops_new_users_and_loads_when_the_last_old_one_leaves() -> None:
    residency = Residency(2, 2 * UNIT, 0.0)
    for key in ("a", "b"):
        assert bring(residency, key, UNIT)
        residency.acquire(key)
    assert not bring(residency, "big", 2 * UNIT, is_aged=True)
    assert residency.try_reserve(residency.entries["big"], lambda _: 3)
    residency.want("a", UNIT)
    assert not residency.is_admitting("a")
    residency.release("a", fence=0)
    residency.finish_reservations()
    assert residency.take_actions().evictions == ()
    assert not bring(residency, "c", UNIT, is_aged=True)
    residency.release("b", fence=0)
    residency.finish_reservations()
    assert [load.adapter for load in residency.take_actions().loads][-1] == "big"


def test_a_reservation_takes_the_adapters_that_drain_first() -> None:
    residency = Residency(2, 2 * UNIT, 0.0)
    for key in ("a", "b"):
        assert bring(residency, key, UNIT)
        residency.acquire(key)
    assert not bring(residency, "c", UNIT, is_aged=True)
    assert residency.try_reserve(residency.entries["c"], {"a": 90, "b": 4}.__getitem__)
    assert residency.reservations["c"].victims == {"b"}


def test_training_adapters_lie_in_their_share_and_leave_room_for_the_largest_request_adapter() -> None:
    residency = Residency(8, 16 * UNIT, 0.5)
    assert bring(residency, "x", UNIT)
    for idx in range(4):
        assert bring(residency, f"job:{idx}", 2 * UNIT)
    assert not bring(residency, "job:4", 2 * UNIT)
    use_once(residency, "x", 1.0)
    assert bring(residency, "largest", residency.regions.max_request_elements)
    residency.check_invariants()


def test_a_removed_job_leaves_after_the_last_plan_that_could_read_it_and_may_come_back() -> None:
    residency = Residency(4, 16 * UNIT, 0.5)
    assert bring(residency, "job:0", 2 * UNIT)
    residency.take_actions()
    residency.remove("job:0", fence=7)
    assert not bring(residency, "job:0", 2 * UNIT)
    residency.advance(1.0, committed=6)
    assert residency.take_actions().evictions == ()
    residency.advance(1.0, committed=7)
    assert residency.take_actions().evictions == (("job:0", 0),)
    assert bring(residency, "job:0", 2 * UNIT)


def test_adapters_that_can_never_be_given_room_are_refused_with_value_and_limit() -> None:
    residency = Residency(4, 16 * UNIT, 0.25)
    with pytest.raises(RequestTooLarge, match="a has 769 elements; the adapter arena offers 768"):
        residency.want("a", 12 * UNIT + 1)
    with pytest.raises(RequestTooLarge, match=r"320 elements; the share of the arena .* offers 256"):
        residency.want("job:0", 5 * UNIT, is_training=True)
    with pytest.raises(RequestTooLarge, match="0 slots"):
        Residency(1, 16 * UNIT, 0.25).want("job:0", UNIT, is_training=True)
    with pytest.raises(RequestTooLarge, match="0 elements"):
        Residency(4, 16 * UNIT, 0.0).want("job:0", UNIT, is_training=True)
    residency.want("b", 0)
    residency.fetch(residency.entries["b"])
    refusal = residency.fetched("b", 13 * UNIT)
    assert refusal is not None
    assert "832 elements" in refusal
    assert residency.failed("b")
    residency.want("c", UNIT)
    with pytest.raises(ValueError, match="64 elements, not 128"):
        residency.want("c", 2 * UNIT)


@pytest.mark.parametrize(("num_elements", "num_fetches"), [(2 * UNIT, 4), (0, 8)])
def test_what_waits_in_host_memory_is_bounded(num_elements: int, num_fetches: int) -> None:
    residency = Residency(8, 8 * UNIT, 0.0)
    for idx in range(20):
        residency.want(f"a{idx}", num_elements)
        entry = residency.entries[f"a{idx}"]
        if residency.staging.try_open_for(entry):
            residency.fetch(entry)
    assert len(residency.take_actions().fetches) == num_fetches


def test_news_that_nobody_awaits_changes_nothing() -> None:
    residency = Residency(2, 2 * UNIT, 0.0)
    assert residency.fetched("unknown", UNIT) is None
    residency.loaded("unknown")
    assert not residency.failed("unknown")
    residency.remove("unknown", fence=0)
    assert bring(residency, "a", UNIT)
    assert not residency.failed("a")
    assert residency.fetched("a", UNIT) is None
    assert residency.slot("a") == 0


def fill(residency: Residency, keys: str) -> None:
    for key in keys:
        assert bring(residency, key, UNIT)
        use_once(residency, key, 1.0)


def unfill(residency: Residency, *keys: str) -> None:
    """Let others take the place of `keys`, then fail to load: holes where they were."""
    for key in keys:
        residency._evict(residency.entries[key])
    residency.take_actions()


def test_holes_are_moved_together_before_anything_is_evicted() -> None:
    residency = Residency(16, 16 * UNIT, 0.0)
    fill(residency, "abcdefghijklmnop")
    unfill(residency, "c", "e")
    residency.advance(2.0, 0)
    assert bring(residency, "new", 2 * UNIT)
    actions = residency.take_actions()
    assert actions.evictions == ()
    (move,) = actions.moves
    assert (move.adapter, move.source, move.destination) == ("d", 3 * UNIT, 2 * UNIT)
    assert [load.offset for load in actions.loads] == [3 * UNIT]
    residency.check_invariants()


def test_an_adapter_in_use_is_not_moved_unless_no_plan_is_in_flight() -> None:
    for is_synchronous in (False, True):
        residency = Residency(16, 16 * UNIT, 0.0, is_synchronous=is_synchronous)
        fill(residency, "abcdefghijklmnop")
        unfill(residency, "c", "e")
        residency.want("d", UNIT)
        residency.acquire("d")
        residency.advance(2.0, 0)
        assert bring(residency, "new", 2 * UNIT)
        actions = residency.take_actions()
        assert len(actions.moves) == is_synchronous
        assert bool(actions.evictions) is not is_synchronous


def test_a_plan_moves_no_more_than_its_share_and_compacts_once() -> None:
    residency = Residency(16, 16 * UNIT, 0.0)
    fill(residency, "abcdefghijklmnop")
    unfill(residency, "a", "e", "h", "k")
    residency.advance(2.0, 0)
    assert bring(residency, "new", 2 * UNIT)
    first = residency.take_actions()
    assert sum(move.num_elements for move in first.moves) == 2 * UNIT
    assert bring(residency, "newer", 3 * UNIT)
    second = residency.take_actions()
    assert not second.moves
    assert second.evictions


def test_what_is_moved_and_evicted_in_one_plan_is_not_moved() -> None:
    residency = Residency(16, 16 * UNIT, 0.0)
    fill(residency, "abcdefghijklmnop")
    unfill(residency, "c", "e")
    residency.advance(2.0, 0)
    assert bring(residency, "new", 2 * UNIT)
    residency._evict(residency.entries["d"])
    actions = residency.take_actions()
    assert actions.moves == ()
    assert [key for key, _ in actions.evictions] == ["d"]


def test_a_pinned_adapter_is_brought_unasked_and_outlives_any_demand() -> None:
    residency = Residency(16, 16 * UNIT, 0.25, pinned_share=0.25)
    residency.pin("p")
    residency.pin("p")
    entry = residency.missing["p"]
    residency.fetch(entry)
    assert residency.fetched("p", 2 * UNIT) is None
    assert residency.try_load(entry, is_aged=False)
    residency.loaded("p")
    assert residency.places.lies_in("p", residency.regions.pinned)
    for idx in range(40):
        assert bring(residency, f"a{idx}", UNIT)
        use_once(residency, f"a{idx}", float(idx))
    assert bring(residency, "largest", residency.regions.max_request_elements, is_aged=True)
    assert "p" not in [key for key, _ in residency.take_actions().evictions]
    residency.unpin("p")
    residency.advance(50.0, 0)
    for idx in range(16):
        assert bring(residency, f"b{idx}", UNIT, is_aged=True)
        use_once(residency, f"b{idx}", 60.0)
    assert "p" in [key for key, _ in residency.take_actions().evictions]
    residency.check_invariants()


def test_an_adapter_that_is_resident_when_it_is_pinned_is_moved_to_where_it_cannot_fragment() -> None:
    residency = Residency(16, 16 * UNIT, 0.25, pinned_share=0.25)
    fill(residency, "abc")
    residency.pin("b")
    residency.settle_pins()
    (move,) = residency.take_actions().moves
    assert (move.adapter, move.source, move.destination) == ("b", UNIT, 8 * UNIT)
    residency.settle_pins()
    assert residency.take_actions().moves == ()


def test_pins_beyond_their_share_are_refused_and_tried_again_later() -> None:
    residency = Residency(16, 16 * UNIT, 0.25, pinned_share=0.25)
    for key, size in (("a", 3 * UNIT), ("b", 2 * UNIT)):
        residency.pin(key)
        residency.fetch(residency.missing[key])
        refusal = residency.fetched(key, size)
        if refusal is None:
            assert residency.try_load(residency.missing[key], is_aged=False)
            residency.loaded(key)
    assert refusal is not None
    assert "2 others" not in refusal
    assert "192 of the 256 elements" in refusal
    assert residency.failed("b")
    assert residency.missing["b"].retry_at_s == PIN_RETRY_S
    residency.want("b", 2 * UNIT)
    assert residency.missing["b"].retry_at_s == 0.0
    residency.unpin("unknown")
    residency.check_invariants()


def test_a_pin_without_a_slot_waits_until_another_is_unpinned() -> None:
    residency = Residency(8, 16 * UNIT, 0.25, pinned_share=0.25)
    for key in "abc":
        residency.pin(key)
    assert list(residency.pins.granted) == ["a", "b"]
    residency.unpin("a")
    assert list(residency.pins.granted) == ["b", "c"]
    assert "a" not in residency.entries
    residency.unpin("c")
    residency.unpin("b")
    assert not residency.entries


def test_an_adapter_in_training_cannot_be_pinned() -> None:
    residency = Residency(16, 16 * UNIT, 0.25, pinned_share=0.25)
    residency.want("job:0", UNIT, is_training=True)
    with pytest.raises(ValueError, match="pin the version"):
        residency.pin("job:0")


def test_several_overdue_adapters_drain_their_places_at_the_same_time() -> None:
    residency = Residency(8, 8 * UNIT, 0.0)
    fill(residency, "abcdefgh")
    for key in "abcdefgh":
        residency.want(key, UNIT)
        residency.acquire(key)
    reserved = []
    for idx in range(6):
        assert not bring(residency, f"new{idx}", UNIT, is_aged=True)
        reserved.append(residency.try_reserve(residency.entries[f"new{idx}"], lambda _: 1))
    assert reserved == [True] * 2 + [False] * 4
    residency.check_invariants()
    for key in "abcdefgh":
        residency.release(key, fence=0)
    residency.finish_reservations()
    loaded = [load.adapter for load in residency.take_actions().loads]
    assert loaded[-2:] == ["new0", "new1"]
