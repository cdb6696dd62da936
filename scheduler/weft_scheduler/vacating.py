"""Which adapters may leave the device or move on it, at what cost, and the cheapest room that this makes.

Looks and prices; it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from weft_scheduler.entries import AdapterState, Entry
from weft_scheduler.eviction import EvictionPolicy
from weft_scheduler.extents import Placement
from weft_scheduler.places import ArenaPlaces
from weft_scheduler.regions import Regions
from weft_scheduler.reservations import Reservations

Cost: TypeAlias = Callable[[str], float | None]
"""What it costs that an adapter leaves; None if it may not."""

_MISPLACED_PIN_PENALTY = 1e18


class Vacating:
    """Views of a `Residency`'s parts. Plans up to iteration `committed` are committed; `is_synchronous` says
    that no plan is in flight when one is made, so that adapters in use may be moved too.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        places: ArenaPlaces,
        regions: Regions,
        reservations: Reservations,
        policy: EvictionPolicy,
        *,
        is_synchronous: bool,
    ) -> None:
        self.committed = 0
        self._entries = entries
        self._places = places
        self._regions = regions
        self._reservations = reservations
        self._policy = policy
        self._is_synchronous = is_synchronous

    def is_idle(self, entry: Entry) -> bool:
        """Whether it is on the device, and nobody and no plan in flight uses it."""
        return (
            entry.state is AdapterState.DEVICE
            and not entry.is_training
            and not entry.num_users
            and entry.fence <= self.committed
        )

    def is_movable(self, key: str) -> bool:
        """Whether it may lie elsewhere from this plan on."""
        entry = self._entries.get(key)
        if entry is None or entry.is_training or entry.state is not AdapterState.DEVICE:
            return False
        is_unread = self.is_idle(entry) or self._is_synchronous
        return is_unread and not self._reservations.is_victim(key)

    def eviction_cost(self, key: str, *, is_aged: bool) -> float | None:
        """What its eviction costs; None if it may not be. One that requests wait for is evicted only for a
        waiter that `is_aged`, and never before its first use.
        """
        entry = self._entries.get(key)
        if entry is None or not self.is_idle(entry) or self._reservations.is_victim(key):
            return None
        if self._is_protected(entry):
            return None
        if entry.num_waiting and (entry.is_fresh or not is_aged):
            return None
        value = self._policy.value(key, entry.num_elements)
        return value + (_MISPLACED_PIN_PENALTY if entry.is_pinned else 0.0)

    def drain_cost(self, key: str, drain_tokens: Callable[[str], int]) -> float | None:
        """What it costs to wait until its users have gone; None if room may not be kept in its place."""
        entry = self._entries.get(key)
        if entry is None or entry.is_training or entry.slot is None or self._reservations.is_victim(key):
            return None
        if self._is_protected(entry) or (entry.is_fresh and entry.num_waiting):
            return None
        return 1.0 + drain_tokens(key)

    def find(self, entry: Entry, cost: Cost) -> Placement | None:
        """The cheapest room: of a training adapter in its region, of a pinned one in its own if possible."""
        extents, avoid = self._places.extents, self._reservations.areas
        lowest, highest = self._regions.of(entry)
        place = extents.find(
            entry.num_elements,
            cost,
            lowest=lowest,
            highest=highest,
            from_top=entry.is_training,
            avoid=avoid,
        )
        if place is None and entry.is_pinned:
            place = extents.find(entry.num_elements, cost, avoid=avoid)
        return place

    def cheapest(self, cost: Cost) -> str | None:
        """The adapter whose slot costs least."""
        priced = [(price, key) for key in self._places.extents if (price := cost(key)) is not None]
        return min(priced)[1] if priced else None

    def _is_protected(self, entry: Entry) -> bool:
        """Whether it is pinned and lies where it belongs; elsewhere it leaves last, and comes back there."""
        return entry.is_pinned and self._places.lies_in(entry.key, self._regions.pinned)
