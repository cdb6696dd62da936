"""Which adapters are on the device: slots, extents, the states on the way there, pins and evictions.

    absent → fetching → host → loading → device → (evicted) absent

Owns decisions about places; the bytes belong to whoever carries out the actions that `take_actions` returns.
An adapter is evicted or moved only when nobody uses it and every plan that could read it is committed, so its
slot and extent are free at once. Training adapters are packed from the arena's top, inside the share that
they may hold, and stay until removed; below them lie pinned ones, inside theirs; all others are packed from
the bottom, so that neither can fragment the room that requests rely on.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from weft_scheduler.entries import AdapterActions, AdapterState, Entry
from weft_scheduler.eviction import DecayedFrequency, EvictionPolicy
from weft_scheduler.extents import Placement, aligned
from weft_scheduler.pins import Pins
from weft_scheduler.places import ArenaPlaces
from weft_scheduler.regions import Regions
from weft_scheduler.relocation import Relocation
from weft_scheduler.requests import RequestTooLarge
from weft_scheduler.reservations import Reservation, Reservations
from weft_scheduler.staging import HostStaging
from weft_scheduler.vacating import Vacating

PIN_RETRY_S = 30.0
"""After how long a pinned adapter that could not be fetched is tried again."""


class Residency:
    """Adapters by key (digest, or the key of a training adapter)."""

    def __init__(
        self,
        num_slots: int,
        arena_elements: int,
        training_share: float,
        *,
        pinned_share: float = 0.0,
        is_synchronous: bool = False,
        policy: EvictionPolicy | None = None,
    ) -> None:
        """Start with an empty arena.

        `is_synchronous` says that no plan is in flight when one is made: then adapters in use may be moved
        too. `policy` is by default a `DecayedFrequency`.
        """
        self.places = ArenaPlaces(num_slots, arena_elements)
        self.extents = self.places.extents
        capacity = self.extents.capacity
        self.regions = Regions.divide(capacity, num_slots, training_share, pinned_share)
        self.entries: dict[str, Entry] = {}
        self.missing: dict[str, Entry] = {}
        self.on_host: dict[str, Entry] = {}
        self.pins = Pins(self.regions)
        self.reservations = Reservations(capacity, num_slots)
        self._relocation = Relocation(self.places, self.regions, self.reservations)
        self.staging = HostStaging(capacity)
        self._policy: EvictionPolicy = policy or DecayedFrequency()
        self._vacating = Vacating(
            self.entries,
            self.places,
            self.regions,
            self.reservations,
            self._policy,
            is_synchronous=is_synchronous,
        )
        self._leaving: list[Entry] = []
        self._num_training_slots = 0
        self._now_s = 0.0
        self._fetches: list[str] = []

    # ------------------------------------------------------------ questions

    def slot(self, key: str) -> int | None:
        """The slot of an adapter that is on the device, else None."""
        entry = self.entries.get(key)
        return entry.slot if entry is not None and entry.state is AdapterState.DEVICE else None

    def is_admitting(self, key: str) -> bool:
        """Whether new users may be added: it is on the device and not about to leave for a reservation."""
        return self.slot(key) is not None and not self.reservations.is_victim(key)

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
        entry.retry_at_s = self._now_s if not is_training else entry.retry_at_s

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
        self._policy.used(key)
        return entry.slot

    def release(self, key: str, fence: int) -> None:
        """One user less; plans up to iteration `fence` may still read the adapter."""
        entry = self.entries[key]
        entry.num_users -= 1
        entry.fence = max(entry.fence, fence)

    def pin(self, key: str) -> None:
        """Bring an adapter near and keep it on the device until `unpin`. Pinning twice is pinning once.

        Beyond the slots that pins may hold it waits until another is unpinned.

        Raises:
            ValueError: it is a training adapter.
        """
        if key in self.entries and self.entries[key].is_training:
            raise ValueError(f"{key} is an adapter in training; pin the version that the job publishes")
        self.pins.ask(key)
        self._grant_pins()

    def unpin(self, key: str) -> None:
        """Let a pinned adapter leave like any other. Unknown keys are ignored."""
        entry = self.pins.drop(key)
        if entry is not None:
            self._forget_if_unwanted(entry)
            self._grant_pins()

    def _grant_pins(self) -> None:
        while (key := self.pins.next_to_grant()) is not None:
            entry = self.entries.get(key)
            if entry is None:
                entry = self.entries[key] = self.missing[key] = Entry(key, 0, is_training=False)
            self.pins.grant(entry, self._now_s)

    def remove(self, key: str, fence: int) -> None:
        """Forget a training adapter; its place is freed once iteration `fence` is committed. Unknown keys are
        ignored.
        """
        entry = self.entries.pop(key, None)
        if entry is None:
            return
        self.missing.pop(key, None)
        self.on_host.pop(key, None)
        self.reservations.drop(key)
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
        reason = self._refusal(key, num_elements, entry.is_training) or self.pins.refusal(entry, num_elements)
        if reason is not None:
            return reason
        entry.num_elements = num_elements
        self.staging.add(entry)
        entry.state = AdapterState.HOST
        self.on_host[key] = entry
        self._forget_if_unwanted(entry)
        return None

    def loaded(self, key: str) -> None:
        """The bytes are on the device. Ignored unless a load is awaited."""
        entry = self._loading(key)
        if entry is not None:
            entry.state = AdapterState.DEVICE

    def failed(self, key: str) -> bool:
        """The fetch or load failed: back to absent. Returns False if none was awaited."""
        entry = self._loading(key)
        if entry is None:
            entry = self.entries.get(key)
            if entry is None or entry.state not in (AdapterState.FETCHING, AdapterState.HOST):
                return False
            self.staging.remove(entry)
            self.on_host.pop(key, None)
        else:
            self.places.free(entry)
            self._vacated(entry)
        entry.state = AdapterState.ABSENT
        entry.retry_at_s = inf if entry.is_training else self._now_s + PIN_RETRY_S
        if self.entries.get(key) is entry:
            self.missing[key] = entry
            self.reservations.drop(key)
            self._forget_if_unwanted(entry)
        else:
            self._leaving.remove(entry)
        return True

    # ------------------------------------------------------------ planning

    def advance(self, now_s: float, committed: int) -> None:
        """Begin a plan: plans up to iteration `committed` are committed; what has been removed may leave."""
        self._now_s = now_s
        self._vacating.committed = committed
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
        self.staging.add(entry)
        self._fetches.append(entry.key)

    def try_load(self, entry: Entry, *, is_aged: bool) -> bool:
        """Give an adapter in host memory a place and start its load: in a hole; else in the hole that a few
        moves make; else evicting the least valuable run of idle ones.

        Adapters that requests wait for are evicted only for a waiter that `is_aged`, and never before their
        first use. Nothing is evicted in vain: False means that nothing changed.
        """
        if any(other.key == entry.key for other in self._leaving) or not self._slot_class_free(entry):
            return False

        def cost(key: str) -> float | None:
            return self._vacating.eviction_cost(key, is_aged=is_aged)

        place = self._vacating.find(entry, cost)
        if place is None or place.victims:
            compacted = self._relocation.try_compact(entry, self.entries, self._vacating.is_movable)
            if compacted is not None:
                place = Placement(compacted, (), 0.0)
        if place is None:
            return False
        victims = list(place.victims)
        if not victims and not self.places.has_free_slot:
            donor = self._vacating.cheapest(cost)
            if donor is None:
                return False
            victims.append(donor)
        self._place(entry, place.offset, victims)
        return True

    def try_reserve(self, entry: Entry, drain_tokens: Callable[[str], int]) -> bool:
        """Keep the run of adapters that drains first for an aged waiter (see `Reservation`).

        `drain_tokens(key)` is the number of tokens that the users of an adapter may still generate.
        One that is waited for is not taken before its first use, lest adapters replace each other for ever.
        False: there is no such run, or reservations hold as much as they may.
        """
        if entry.key in self.reservations or not self._slot_class_free(entry):
            return False
        if not self.reservations.has_room_for(aligned(entry.num_elements)):
            return False

        def cost(key: str) -> float | None:
            return self._vacating.drain_cost(key, drain_tokens)

        place = self._vacating.find(entry, cost)
        if place is None:
            return False
        victims = set(place.victims)
        if not victims:
            donor = self._vacating.cheapest(cost)
            if donor is None:
                return False
            victims.add(donor)
        start, end = place.offset, place.offset + aligned(entry.num_elements)
        for key in place.victims:
            start, end = min(start, self.extents[key].start), max(end, self.extents[key].end)
        self.reservations.add(Reservation(entry.key, place.offset, frozenset(victims), (start, end)))
        return True

    def finish_reservations(self) -> None:
        """Load the reserved adapters whose victims are all idle."""
        for reservation in self.reservations.all():
            entry = self.entries.get(reservation.key)
            if entry is None or not entry.is_wanted or entry.state is not AdapterState.HOST:
                self.reservations.drop(reservation.key)
                continue
            staying = [key for key in reservation.victims if key in self.extents]
            if all(self._vacating.is_idle(self.entries[key]) for key in staying):
                self.reservations.drop(reservation.key)
                if staying or self.places.has_free_slot:
                    self._place(entry, reservation.offset, staying)

    def settle_pins(self) -> None:
        """Move a pinned adapter that lies elsewhere to the region of the pinned, if it may move and finds
        room.
        """
        self._relocation.settle(
            self.pins.granted.values(),
            self._vacating.is_movable,
            lambda key: self._vacating.eviction_cost(key, is_aged=False),
            lambda key: self._evict(self.entries[key]),
        )

    def take_actions(self) -> AdapterActions:
        """What has been decided since the last call."""
        actions = AdapterActions(*self.places.take(), tuple(self._fetches))
        self._fetches = []
        return actions

    def check_invariants(self) -> None:
        """States, slots and extents agree.

        Raises:
            AssertionError: they do not.
        """
        everyone = [*self.entries.values(), *self._leaving]
        placed = [entry for entry in everyone if entry.slot is not None]
        self.places.check_invariants(placed)
        for entry in everyone:
            is_placed = entry.state in (AdapterState.LOADING, AdapterState.DEVICE)
            assert (entry.slot is not None) == is_placed, entry
            assert entry.num_users >= 0 <= entry.num_waiting, entry
            assert not entry.num_users or entry.state is AdapterState.DEVICE, entry
        assert set(self.missing) == {key for key, entry in self.entries.items() if entry.slot is None}
        training = [entry for entry in placed if entry.is_training]
        assert len(training) == self._num_training_slots <= self.regions.max_training_slots
        assert all(self.places.lies_in(entry.key, self.regions.training) for entry in training)
        assert set(self.pins.granted) == {key for key, entry in self.entries.items() if entry.is_pinned}
        assert set(self.on_host) == {
            key for key, entry in self.entries.items() if entry.state is AdapterState.HOST
        }
        assert len(self.pins.granted) <= self.regions.max_pinned_slots
        victims = [key for kept in self.reservations.all() for key in kept.victims]
        assert len(set(victims)) == len(victims)
        staged = (AdapterState.FETCHING, AdapterState.HOST)
        for entry in everyone:
            assert not entry.staged_elements or entry.state in staged, entry
        assert self.staging.num_elements == sum(entry.staged_elements for entry in everyone)

    # ------------------------------------------------------------ inside

    def _refusal(self, key: str, num_elements: int, is_training: bool) -> str | None:
        most = self.regions.training_elements if is_training else self.regions.max_request_elements
        num_slots = self.regions.max_training_slots if is_training else self.places.num_slots
        if num_elements >= 1 and aligned(num_elements) <= most and num_slots:
            return None
        room = "the share of the arena that training adapters may pin" if is_training else "the adapter arena"
        return (
            f"adapter {key} has {num_elements} elements; {room} offers {most} elements and {num_slots} slots"
        )

    def _slot_class_free(self, entry: Entry) -> bool:
        """Whether a training adapter finds a slot among those that jobs may hold; for others always."""
        return not entry.is_training or self._num_training_slots < self.regions.max_training_slots

    def _place(self, entry: Entry, offset: int, victims: list[str]) -> None:
        for key in sorted(victims):
            self._evict(self.entries[key])
        self.staging.remove(entry)
        self.on_host.pop(entry.key)
        self.reservations.drop(entry.key)
        del self.missing[entry.key]
        entry.state = AdapterState.LOADING
        entry.is_fresh = True
        self._num_training_slots += entry.is_training
        self.places.load(entry, offset)

    def _evict(self, entry: Entry) -> None:
        self.places.evict(entry)
        self._vacated(entry)
        if self.entries.get(entry.key) is entry:
            self.missing[entry.key] = entry
            self._forget_if_unwanted(entry)

    def _vacated(self, entry: Entry) -> None:
        entry.state = AdapterState.ABSENT
        entry.is_fresh = False
        self._num_training_slots -= entry.is_training

    def _forget_if_unwanted(self, entry: Entry) -> None:
        if entry.is_wanted or entry.state not in (AdapterState.ABSENT, AdapterState.HOST):
            return
        if entry.state is AdapterState.HOST:
            self.staging.remove(entry)
            self.on_host.pop(entry.key)
        del self.entries[entry.key]
        del self.missing[entry.key]

    def _loading(self, key: str) -> Entry | None:
        for entry in self._leaving:
            if entry.key == key and entry.state is AdapterState.LOADING:
                return entry
        entry_or_none = self.entries.get(key)
        is_loading = entry_or_none is not None and entry_or_none.state is AdapterState.LOADING
        return entry_or_none if is_loading else None
