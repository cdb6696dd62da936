"""The adapter arena as a line of extents: where each adapter lies and which run of them gives room most
cheaply.

Owns offsets alone; it does not know why an adapter may or may not be evicted: that is the caller's cost
function.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from weft_scheduler.compaction import Compaction, Span, find_compaction

ALIGNMENT = 64
"""Elements: offsets and sizes are multiples of it (128 bytes in 16-bit formats)."""


def aligned(num_elements: int) -> int:
    """`num_elements` rounded up to the alignment of extents."""
    return -(-num_elements // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Extent:
    """`[start, end)` of the arena, held by `key`."""

    start: int
    end: int
    key: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Room at `offset`, once `victims` have left; `cost` is the sum of their costs."""

    offset: int
    victims: tuple[str, ...]
    cost: float


class ExtentMap:
    """The extents in an arena of `capacity` elements. Holes are what lies between them, so they coalesce by
    themselves.
    """

    def __init__(self, capacity: int) -> None:
        """Start empty; an unaligned tail of the arena stays unused."""
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self._extents: list[Extent] = []
        self._by_key: dict[str, Extent] = {}
        self.num_held = 0

    def __len__(self) -> int:
        """Extents held."""
        return len(self._extents)

    def __iter__(self) -> Iterator[str]:
        """The keys that hold an extent."""
        return iter(self._by_key)

    def __contains__(self, key: object) -> bool:
        """Whether `key` holds an extent."""
        return key in self._by_key

    def __getitem__(self, key: str) -> Extent:
        """The extent that `key` holds."""
        return self._by_key[key]

    def insert(self, key: str, offset: int, num_elements: int) -> Extent:
        """Give `[offset, offset + aligned(num_elements))` to `key`.

        Raises:
            ValueError: it overlaps another extent, leaves the arena, is unaligned, or `key` already holds
        one.
        """
        extent = Extent(offset, offset + aligned(num_elements), key)
        idx = bisect_left(self._extents, offset, key=lambda other: other.start)
        overlaps = (idx > 0 and self._extents[idx - 1].end > offset) or (
            idx < len(self._extents) and self._extents[idx].start < extent.end
        )
        if overlaps or key in self._by_key or offset < 0 or extent.end > self.capacity or offset % ALIGNMENT:
            raise ValueError(f"{extent} does not fit into the arena of {self.capacity} elements")
        insort(self._extents, extent, key=lambda other: other.start)
        self._by_key[key] = extent
        self.num_held += extent.end - extent.start
        return extent

    def remove(self, key: str) -> None:
        """Free the extent of `key`.

        Raises:
            KeyError: it holds none.
        """
        extent = self._by_key.pop(key)
        self._extents.remove(extent)
        self.num_held -= extent.end - extent.start

    def find(
        self,
        num_elements: int,
        cost: Callable[[str], float | None],
        *,
        lowest: int = 0,
        from_top: bool = False,
        highest: int | None = None,
        avoid: Sequence[tuple[int, int]] = (),
    ) -> Placement | None:
        """The cheapest contiguous room for `num_elements` in `[lowest, highest)`; a hole costs nothing.

        `cost(key)` is the price of evicting an extent, None if it must stay. Equal prices go to the lowest
        offset (first fit), with `from_top` to the highest. `avoid` are disjoint ranges `[start, end)` that
        must not be touched. One sweep: for each left edge, the nearest right edge that gives enough room.
        """
        size = aligned(num_elements)
        top = self.capacity if highest is None else highest
        spans = self._spans(cost, lowest, avoid)
        best: tuple[float, int] | None = None
        victims: tuple[str, ...] = ()
        right, total = 0, 0.0
        for left in range(len(spans) + 1):
            if right < left:
                right, total = left, 0.0
            start = lowest if left == 0 else max(lowest, spans[left - 1][1])
            end = min(spans[right][0], top) if right < len(spans) else top
            while end - start < size and right < len(spans):
                price = spans[right][3]
                if price is None:
                    break
                total += price
                right += 1
                end = min(spans[right][0], top) if right < len(spans) else top
            if end - start >= size:
                offset = end - size if from_top else start
                rank = (total if right > left else 0.0, -offset if from_top else offset)
                if best is None or rank < best:
                    best, victims = rank, tuple(span[2] for span in spans[left:right])
            elif right == len(spans):
                break
            if left < right:
                total -= spans[left][3] or 0.0
        if best is None:
            return None
        return Placement(-best[1] if from_top else best[1], victims, best[0])

    def move(self, key: str, offset: int) -> None:
        """Let the extent of `key` begin at `offset`; the two may overlap.

        Raises:
            KeyError: it holds none.
            ValueError: as `insert`; nothing has changed.
        """
        old = self._by_key[key]
        self.remove(key)
        try:
            self.insert(key, offset, old.end - old.start)
        except ValueError:
            self.insert(key, old.start, old.end - old.start)
            raise

    def find_compaction(
        self,
        num_elements: int,
        is_movable: Callable[[str], bool],
        *,
        max_moved: int,
        lowest: int = 0,
        highest: int | None = None,
        avoid: Sequence[tuple[int, int]] = (),
    ) -> Compaction | None:
        """The cheapest moves that make a hole of `num_elements` in `[lowest, highest)`; ranges as in `find`.

        At most `max_moved` elements are moved, and only extents whose `is_movable(key)` holds.
        """
        top = self.capacity if highest is None else highest
        spans = [
            Span(start, end, key, price is not None and lowest <= start and end <= top)
            for start, end, key, price in self._spans(
                lambda key: 0.0 if is_movable(key) else None, lowest, avoid
            )
            if start < top
        ]
        return find_compaction(spans, lowest, top, aligned(num_elements), max_moved)

    def check_invariants(self) -> None:
        """Extents are ordered, disjoint, aligned and inside the arena.

        Raises:
            AssertionError: they are not.
        """
        end = 0
        for extent in self._extents:
            assert end <= extent.start < extent.end <= self.capacity, extent
            assert extent.start % ALIGNMENT == extent.end % ALIGNMENT == 0, extent
            end = extent.end
        assert {extent.key: extent for extent in self._extents} == self._by_key
        assert self.num_held == sum(extent.end - extent.start for extent in self._extents)

    def _spans(
        self, cost: Callable[[str], float | None], lowest: int, avoid: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int, str, float | None]]:
        spans: list[tuple[int, int, str, float | None]] = []
        for extent in self._extents:
            if extent.end <= lowest:
                continue
            if any(extent.start < area[1] and area[0] < extent.end for area in avoid):
                continue
            spans.append((extent.start, extent.end, extent.key, cost(extent.key)))
        for area in avoid:
            if area[1] > lowest:
                insort(spans, (*area, "", None), key=lambda span: span[0])
        return spans
