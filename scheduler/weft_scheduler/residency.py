"""Which adapters are on the device: slots, extents, the states on the way there, pins and evictions.

    absent → fetching → host → loading → device → (evicted) absent

Owns decisions about places; the bytes belong to whoever carries out the actions that `take_actions` returns.
An adapter is evicted only when nobody uses it and every plan that could read it is committed, so its slot and
extent are free at once. Training adapters are packed from the arena's top, inside the share that they may
pin, and stay until removed; all others are packed from the bottom, so that pinned jobs cannot fragment the
room that requests rely on.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

from weft_scheduler.entries import AdapterActions, AdapterState, Entry, Reservation
from weft_scheduler.extents import ALIGNMENT, ExtentMap, aligned
from weft_scheduler.plan import AdapterLoad
from weft_scheduler.requests import RequestTooLarge

RELOAD_OVERHEAD_ELEMENTS = 1 << 20
"""The fixed latency of a reload, as the number of elements copied in that time: small adapters are dear for
their size.
"""

_MIN_AGE_S = 1e-3
_UNUSED_PENALTY_TOKENS = 1 << 20


class Residency:
    """Adapters by key (digest, or the key of a training adapter)."""

    def __init__(self, num_slots: int, arena_elements: int, training_share: float) -> None:
        """Start with an empty arena."""
        self.extents = ExtentMap(arena_elements)
        self.entries: dict[str, Entry] = {}
        self.missing: dict[str, Entry] = {}
        self.reservation: Reservation | None = None
        self.num_slots = num_slots
        self.training_elements = int(self.extents.capacity * training_share) // ALIGNMENT * ALIGNMENT
        self.max_training_slots = min(max(1, int(num_slots * training_share)), max(num_slots - 1, 0))
        if training_share == 0.0:
            self.max_training_slots = 0
        self._free_slots = list(range(num_slots))
        self._leaving: list[Entry] = []
        self._staged_elements = 0
        self._largest_known = 0
        self._num_training_slots = 0
        self._now_s = 0.0
        self._committed = 0
        self._evictions: list[tuple[str, int]] = []
        self._loads: list[AdapterLoad] = []
        self._fetches: list[str] = []

    # ------------------------------------------------------------ questions

    @property
    def max_inference_elements(self) -> int:
        """The largest adapter that can always be given room, whatever jobs pin."""
        return self.extents.capacity - self.training_elements

    @property
    def num_resident(self) -> int:
        """Slots in use (loading or loaded)."""
        return self.num_slots - len(self._free_slots)

    def slot(self, key: str) -> int | None:
        """The slot of an adapter that is on the device, else None."""
        entry = self.entries.get(key)
        return entry.slot if entry is not None and entry.state is AdapterState.DEVICE else None

    def is_admitting(self, key: str) -> bool:
        """Whether new users may be added: it is on the device and not about to leave for a reservation."""
        if self.reservation is not None and key in self.reservation.victims:
            return False
        return self.slot(key) is not None

    def room_to_fetch(self, entry: Entry) -> bool:
        """Whether another fetch keeps what waits in host memory within one arena (one always may)."""
        staged = self._staged_elements
        return not staged or staged + self._size_or_guess(entry) <= self.extents.capacity

    # ------------------------------------------------------------ demand

    def want(self, key: str, num_elements: int, *, is_training: bool = False) -> None:
        """Note one more waiter (request or job) for an adapter of `num_elements` elements, 0 if not known
        yet.

        Raises:
            RequestTooLarge: it could never be given room.
            ValueError: it is known with another size.
        """
        entry = self.entries.get(key)
        if entry is None:
            reason = self._refusal(key, num_elements, is_training) if num_elements or is_training else None
            if reason is not None:
                raise RequestTooLarge(reason)
            entry = self.entries[key] = self.missing[key] = Entry(key, num_elements, is_training)
        elif entry.is_training != is_training or 0 != num_elements != entry.num_elements != 0:
            raise ValueError(f"adapter {key} has {entry.num_elements} elements, not {num_elements}")
        entry.num_waiting += 1

    def unwant(self, key: str) -> None:
        """One waiter less; an adapter that nobody waits for any more is not brought nearer."""
        entry = self.entries[key]
        entry.num_waiting -= 1
        self._forget_if_unwanted(entry)

    def acquire(self, key: str) -> int:
        """Turn a waiter into a user, which pins the adapter; returns its slot.

        Raises:
            ValueError: it is not on the device.
        """
        entry = self.entries[key]
        if entry.state is not AdapterState.DEVICE or entry.slot is None:
            raise ValueError(f"adapter {key} is {entry.state.value}, not on the device")
        entry.num_waiting -= 1
        entry.num_users += 1
        entry.is_fresh = False
        entry.last_used_s = self._now_s
        return entry.slot

    def release(self, key: str, fence: int) -> None:
        """One user less; plans up to iteration `fence` may still read the adapter."""
        entry = self.entries[key]
        entry.num_users -= 1
        entry.fence = max(entry.fence, fence)
        entry.last_used_s = self._now_s

    def remove(self, key: str, fence: int) -> None:
        """Forget a training adapter; its place is freed once iteration `fence` is committed. Unknown keys are
        ignored.
        """
        entry = self.entries.pop(key, None)
        if entry is None:
            return
        self.missing.pop(key, None)
        if self.reservation is not None and self.reservation.key == key:
            self.reservation = None
        if entry.slot is not None:
            entry.fence = max(entry.fence, fence)
            self._leaving.append(entry)

    # ------------------------------------------------------------ news from the engine

    def fetched(self, key: str, num_elements: int) -> str | None:
        """The bytes are in host memory. Ignored unless a fetch is awaited.

        Returns why the adapter cannot be loaded, if it cannot: then it stays where it is until `failed` is
        called.
        """
        entry = self.entries.get(key)
        if entry is None or entry.state is not AdapterState.FETCHING:
            return None
        if entry.num_elements not in (0, num_elements):
            return f"adapter {key} has {num_elements} elements, not {entry.num_elements} as announced"
        reason = self._refusal(key, num_elements, entry.is_training)
        if reason is not None:
            return reason
        self._unstage(entry)
        entry.num_elements = num_elements
        self._stage(entry)
        entry.state = AdapterState.HOST
        self._forget_if_unwanted(entry)
        return None

    def loaded(self, key: str) -> None:
        """The bytes are on the device. Ignored unless a load is awaited."""
        entry = self._loading(key)
        if entry is not None:
            entry.state = AdapterState.DEVICE
            entry.last_used_s = self._now_s

    def failed(self, key: str) -> bool:
        """The fetch or load failed: back to absent. Returns False if none was awaited."""
        entry = self._loading(key)
        if entry is None:
            entry = self.entries.get(key)
            if entry is None or entry.state not in (AdapterState.FETCHING, AdapterState.HOST):
                return False
            self._unstage(entry)
        else:
            self._free_place(entry)
        entry.state = AdapterState.ABSENT
        entry.has_failed = entry.is_training
        if self.entries.get(key) is entry:
            self.missing[key] = entry
            if self.reservation is not None and self.reservation.key == key:
                self.reservation = None
            self._forget_if_unwanted(entry)
        else:
            self._leaving.remove(entry)
        return True

    # ------------------------------------------------------------ planning

    def advance(self, now_s: float, committed: int) -> None:
        """Begin a plan: plans up to iteration `committed` are committed; what has been removed may leave."""
        self._now_s = now_s
        self._committed = committed
        staying = []
        for entry in self._leaving:
            if entry.state is AdapterState.DEVICE and entry.fence <= committed:
                self._evict(entry)
            else:
                staying.append(entry)
        self._leaving = staying

    def fetch(self, entry: Entry) -> None:
        """Start to fetch an absent adapter."""
        entry.state = AdapterState.FETCHING
        self._stage(entry)
        self._fetches.append(entry.key)

    def try_load(self, entry: Entry, *, is_aged: bool) -> bool:
        """Give an adapter in host memory a place and start its load, evicting the least valuable run of idle
        ones.

        Adapters that requests wait for are evicted only for a waiter that `is_aged`, and never before their
        first use. Nothing is evicted in vain: False means that nothing changed.
        """
        if any(other.key == entry.key for other in self._leaving) or not self._training_slot_free(entry):
            return False

        def cost(key: str) -> float | None:
            return self._eviction_cost(key, is_aged=is_aged)

        area = self.reservation.area if self.reservation is not None else None
        place = self.extents.find(
            entry.num_elements, cost, lowest=self._lowest(entry), from_top=entry.is_training, avoid=area
        )
        if place is None:
            return False
        victims = list(place.victims)
        if not victims and not self._free_slots:
            donor = self._cheapest(cost)
            if donor is None:
                return False
            victims.append(donor)
        self._place(entry, place.offset, victims)
        return True

    def try_reserve(self, entry: Entry, drain_tokens: Callable[[str], int]) -> bool:
        """Keep the run of adapters that drains first for an aged waiter (see `Reservation`).

        `drain_tokens(key)` is the number of tokens that the users of an adapter may still generate.
        """
        if self.reservation is not None or not self._training_slot_free(entry):
            return False

        def cost(key: str) -> float | None:
            other = self.entries.get(key)
            if other is None or other.is_training or other.slot is None:
                return None
            is_unused = other.is_fresh and other.num_waiting > 0
            return 1.0 + drain_tokens(key) + (_UNUSED_PENALTY_TOKENS if is_unused else 0)

        place = self.extents.find(
            entry.num_elements, cost, lowest=self._lowest(entry), from_top=entry.is_training
        )
        if place is None:
            return False
        victims = set(place.victims)
        if not victims:
            donor = self._cheapest(cost)
            if donor is None:
                return False
            victims.add(donor)
        start, end = place.offset, place.offset + aligned(entry.num_elements)
        for key in place.victims:
            start, end = min(start, self.extents[key].start), max(end, self.extents[key].end)
        self.reservation = Reservation(entry.key, place.offset, frozenset(victims), (start, end))
        return True

    def try_finish_reservation(self) -> None:
        """Load the reserved adapter if all its victims are idle."""
        reservation = self.reservation
        if reservation is None:
            return
        entry = self.entries.get(reservation.key)
        if entry is None or not entry.num_waiting or entry.state is not AdapterState.HOST:
            self.reservation = None
            return
        staying = [key for key in reservation.victims if key in self.extents]
        if all(self._is_idle(self.entries[key]) for key in staying):
            self.reservation = None
            if staying or self._free_slots:
                self._place(entry, reservation.offset, staying)

    def take_actions(self) -> AdapterActions:
        """What has been decided since the last call."""
        actions = AdapterActions(tuple(self._evictions), tuple(self._loads), tuple(self._fetches))
        self._evictions, self._loads, self._fetches = [], [], []
        return actions

    def check_invariants(self) -> None:
        """States, slots and extents agree.

        Raises:
            AssertionError: they do not.
        """
        self.extents.check_invariants()
        everyone = [*self.entries.values(), *self._leaving]
        placed = [entry for entry in everyone if entry.slot is not None]
        slots = [entry.slot for entry in placed if entry.slot is not None]
        assert sorted([*slots, *self._free_slots]) == list(range(self.num_slots))
        assert len({entry.key for entry in placed}) == len(placed) == len(self.extents)
        for entry in everyone:
            is_placed = entry.state in (AdapterState.LOADING, AdapterState.DEVICE)
            assert (entry.slot is not None) == is_placed, entry
            assert not is_placed or entry.key in self.extents, entry
            assert entry.num_users >= 0 <= entry.num_waiting, entry
            assert not entry.num_users or entry.state is AdapterState.DEVICE, entry
        assert set(self.missing) == {key for key, entry in self.entries.items() if entry.slot is None}
        training = [entry for entry in placed if entry.is_training]
        assert len(training) == self._num_training_slots <= self.max_training_slots
        floor = self.extents.capacity - self.training_elements
        assert all(self.extents[entry.key].start >= floor for entry in training)
        staged = (AdapterState.FETCHING, AdapterState.HOST)
        for entry in everyone:
            assert not entry.staged_elements or entry.state in staged, entry
        assert self._staged_elements == sum(entry.staged_elements for entry in everyone)

    # ------------------------------------------------------------ inside

    def _refusal(self, key: str, num_elements: int, is_training: bool) -> str | None:
        most = self.training_elements if is_training else self.max_inference_elements
        num_slots = self.max_training_slots if is_training else self.num_slots
        if num_elements >= 1 and aligned(num_elements) <= most and num_slots:
            return None
        room = "the share of the arena that training adapters may pin" if is_training else "the adapter arena"
        return (
            f"adapter {key} has {num_elements} elements; {room} offers {most} elements and {num_slots} slots"
        )

    def _lowest(self, entry: Entry) -> int:
        return self.extents.capacity - self.training_elements if entry.is_training else 0

    def _training_slot_free(self, entry: Entry) -> bool:
        return not entry.is_training or self._num_training_slots < self.max_training_slots

    def _is_idle(self, entry: Entry) -> bool:
        return (
            entry.state is AdapterState.DEVICE
            and not entry.is_training
            and not entry.num_users
            and entry.fence <= self._committed
        )

    def _eviction_cost(self, key: str, *, is_aged: bool) -> float | None:
        entry = self.entries.get(key)
        if entry is None or not self._is_idle(entry):
            return None
        if entry.num_waiting and (entry.is_fresh or not is_aged):
            return None
        if self.reservation is not None and key in self.reservation.victims:
            return None
        age_s = max(self._now_s - entry.last_used_s, _MIN_AGE_S)
        return (RELOAD_OVERHEAD_ELEMENTS + entry.num_elements) / age_s

    def _cheapest(self, cost: Callable[[str], float | None]) -> str | None:
        priced = [(price, key) for key in self.extents if (price := cost(key)) is not None]
        return min(priced)[1] if priced else None

    def _place(self, entry: Entry, offset: int, victims: list[str]) -> None:
        for key in sorted(victims):
            self._evict(self.entries[key])
        self._unstage(entry)
        del self.missing[entry.key]
        entry.slot = heappop(self._free_slots)
        entry.state = AdapterState.LOADING
        entry.is_fresh = True
        entry.last_used_s = self._now_s
        self._num_training_slots += entry.is_training
        self.extents.insert(entry.key, offset, entry.num_elements)
        self._loads.append(AdapterLoad(entry.key, entry.slot, offset, entry.num_elements))

    def _evict(self, entry: Entry) -> None:
        assert entry.slot is not None
        self._evictions.append((entry.key, entry.slot))
        self._free_place(entry)
        entry.state = AdapterState.ABSENT
        if self.entries.get(entry.key) is entry:
            self.missing[entry.key] = entry
            self._forget_if_unwanted(entry)

    def _free_place(self, entry: Entry) -> None:
        assert entry.slot is not None
        self.extents.remove(entry.key)
        heappush(self._free_slots, entry.slot)
        entry.slot = None
        entry.is_fresh = False
        self._num_training_slots -= entry.is_training

    def _stage(self, entry: Entry) -> None:
        if not entry.is_training:
            self._largest_known = max(entry.num_elements, self._largest_known)
            entry.staged_elements = self._size_or_guess(entry)
            self._staged_elements += entry.staged_elements

    def _size_or_guess(self, entry: Entry) -> int:
        """An adapter of unknown size is taken to be as large as the largest known one, at first an eighth."""
        return entry.num_elements or self._largest_known or max(self.extents.capacity // 8, 1)

    def _unstage(self, entry: Entry) -> None:
        self._staged_elements -= entry.staged_elements
        entry.staged_elements = 0

    def _forget_if_unwanted(self, entry: Entry) -> None:
        if entry.num_waiting or entry.state not in (AdapterState.ABSENT, AdapterState.HOST):
            return
        if entry.state is AdapterState.HOST:
            self._unstage(entry)
        del self.entries[entry.key]
        del self.missing[entry.key]

    def _loading(self, key: str) -> Entry | None:
        for entry in self._leaving:
            if entry.key == key and entry.state is AdapterState.LOADING:
                return entry
        entry_or_none = self.entries.get(key)
        is_loading = entry_or_none is not None and entry_or_none.state is AdapterState.LOADING
        return entry_or_none if is_loading else None
