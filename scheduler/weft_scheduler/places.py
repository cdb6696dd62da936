"""Slots and extents of the adapter arena, and the actions that change them: evictions, moves, loads.

Owns who is where and what the engine has still to be told; it does not know why anything is placed or leaves.
"""

from __future__ import annotations

from heapq import heappop, heappush

from weft_scheduler.entries import Entry
from weft_scheduler.extents import ExtentMap
from weft_scheduler.plan import AdapterLoad, AdapterMove


class ArenaPlaces:
    """An entry that has a place has a slot and holds an extent under its key."""

    def __init__(self, num_slots: int, arena_elements: int) -> None:
        """Start empty."""
        self.extents = ExtentMap(arena_elements)
        self.num_slots = num_slots
        self.slot_elements = [0] * num_slots
        """The elements of the adapter in each slot, or of the last that was there."""
        self._free_slots = list(range(num_slots))
        self._evictions: list[tuple[str, int]] = []
        self._moves: list[AdapterMove] = []
        self._loads: list[AdapterLoad] = []

    @property
    def has_free_slot(self) -> bool:
        """Whether another adapter finds a slot."""
        return bool(self._free_slots)

    @property
    def num_taken(self) -> int:
        """Slots in use."""
        return self.num_slots - len(self._free_slots)

    @property
    def has_moved(self) -> bool:
        """Whether moves have been decided since the last `take`."""
        return bool(self._moves)

    def lies_in(self, key: str, region: tuple[int, int]) -> bool:
        """Whether all of an extent is inside `[start, end)`."""
        extent = self.extents[key]
        return region[0] <= extent.start and extent.end <= region[1]

    def load(self, entry: Entry, offset: int) -> None:
        """Give an entry a slot and the extent at `offset`."""
        entry.slot = heappop(self._free_slots)
        self.slot_elements[entry.slot] = entry.num_elements
        self.extents.insert(entry.key, offset, entry.num_elements)
        self._loads.append(AdapterLoad(entry.key, entry.slot, offset, entry.num_elements))

    def move(self, entry: Entry, destination: int) -> None:
        """Move the extent of an entry."""
        assert entry.slot is not None
        source = self.extents[entry.key].start
        self.extents.move(entry.key, destination)
        self._moves.append(AdapterMove(entry.key, entry.slot, source, destination, entry.num_elements))

    def evict(self, entry: Entry) -> None:
        """Take an entry's place away and tell the engine; what has been moved in vain stays where it was."""
        assert entry.slot is not None
        self._evictions.append((entry.key, entry.slot))
        self._moves = [move for move in self._moves if move.adapter != entry.key]
        self.free(entry)

    def free(self, entry: Entry) -> None:
        """Take an entry's place away; the engine knows already."""
        assert entry.slot is not None
        self.extents.remove(entry.key)
        heappush(self._free_slots, entry.slot)
        entry.slot = None

    def take(self) -> tuple[tuple[tuple[str, int], ...], tuple[AdapterMove, ...], tuple[AdapterLoad, ...]]:
        """Evictions, moves and loads decided since the last call."""
        taken = tuple(self._evictions), tuple(self._moves), tuple(self._loads)
        self._evictions, self._moves, self._loads = [], [], []
        return taken

    def check_invariants(self, placed: list[Entry]) -> None:
        """`placed` are exactly those that hold slots and extents.

        Raises:
            AssertionError: they are not.
        """
        self.extents.check_invariants()
        slots = [entry.slot for entry in placed if entry.slot is not None]
        assert sorted([*slots, *self._free_slots]) == list(range(self.num_slots))
        assert len({entry.key for entry in placed}) == len(placed) == len(self.extents)
        assert all(entry.key in self.extents for entry in placed)
