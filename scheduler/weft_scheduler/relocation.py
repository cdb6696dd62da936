"""Moves of adapters inside the arena: together, so that a hole becomes large enough; and pinned ones to their
region.

Decides which moves, and bounds them; it does not know which adapters may move or leave: its caller does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from weft_scheduler.entries import Entry
from weft_scheduler.extents import aligned
from weft_scheduler.places import ArenaPlaces
from weft_scheduler.regions import Regions
from weft_scheduler.reservations import Reservations

MAX_MOVED_SHARE = 0.125
"""Part of the arena that one plan may move to make room."""

MAX_MOVED_RATIO = 4
"""Elements that may be moved for each element of the adapter that they make room for."""


class Relocation:
    """Moves extents of `places`, outside the areas of `reservations`. One occasion for moves a plan."""

    def __init__(self, places: ArenaPlaces, regions: Regions, reservations: Reservations) -> None:
        """Share the parts of a `Residency`."""
        self._places = places
        self._regions = regions
        self._reservations = reservations

    def try_compact(
        self, entry: Entry, entries: Mapping[str, Entry], is_movable: Callable[[str], bool]
    ) -> int | None:
        """Make a hole for `entry` of smaller ones; returns its offset, None if a few moves cannot do it."""
        places, size = self._places, aligned(entry.num_elements)
        is_roomy = places.extents.capacity - places.extents.num_held >= size
        if places.has_moved or not places.has_free_slot or not is_roomy:
            return None
        lowest, highest = self._regions.of(entry)
        found = places.extents.find_compaction(
            entry.num_elements,
            is_movable,
            max_moved=min(int(MAX_MOVED_SHARE * places.extents.capacity), MAX_MOVED_RATIO * size),
            lowest=lowest,
            highest=highest,
            avoid=self._reservations.areas,
        )
        if found is None:
            return None
        for shift in found.shifts:
            places.move(entries[shift.key], shift.destination)
        return found.end - size if entry.is_training else found.start

    def settle(
        self,
        pinned: Iterable[Entry],
        is_movable: Callable[[str], bool],
        cost: Callable[[str], float | None],
        evict: Callable[[str], None],
    ) -> None:
        """Move one pinned adapter that lies elsewhere to the region of the pinned, if it finds room there."""
        places, (lowest, highest) = self._places, self._regions.pinned
        for entry in pinned:
            if entry.slot is None or places.lies_in(entry.key, (lowest, highest)):
                continue
            if not is_movable(entry.key):
                continue
            place = places.extents.find(
                entry.num_elements, cost, lowest=lowest, highest=highest, avoid=self._reservations.areas
            )
            if place is not None and entry.key not in place.victims:
                for key in sorted(place.victims):
                    evict(key)
                places.move(entry, place.offset)
                return
