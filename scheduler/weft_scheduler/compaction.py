"""Which adapters to move so that the holes between them become one that is large enough.

Pure geometry on a line of spans; it does not know what may be moved, or why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """`[start, end)` held by `key`; a span that is not movable stays where it is."""

    start: int
    end: int
    key: str
    is_movable: bool


@dataclass(frozen=True, slots=True)
class Shift:
    """Move what `key` holds from `source` down to `destination`."""

    key: str
    source: int
    destination: int


@dataclass(frozen=True, slots=True)
class Compaction:
    """`shifts`, made in this order, leave `[start, end)` free."""

    shifts: tuple[Shift, ...]
    start: int
    end: int


def find_compaction(
    spans: Sequence[Span], lowest: int, highest: int, size: int, max_moved: int
) -> Compaction | None:
    """The compaction that moves the fewest elements, at most `max_moved`, and leaves a hole of `size`.

    A run of neighbouring movable spans is pushed down onto what lies before it; the holes before, between
    and behind them become one. `spans` are ordered and disjoint; room is looked for in `[lowest, highest)`.
    One sweep: for each first span of a run, the shortest run that frees enough.
    """
    starts = [*(max(span.start, lowest) for span in spans), highest]
    ends = [lowest, *(max(span.end, lowest) for span in spans)]
    holes = [max(start - end, 0) for start, end in zip(starts, ends, strict=True)]
    best: tuple[int, int, int] | None = None
    right, free, moved = 0, holes[0], 0
    for left in range(len(spans)):
        if right < left:
            right, free, moved = left, holes[left], 0
        while free < size and right < len(spans) and spans[right].is_movable:
            moved += spans[right].end - spans[right].start
            right += 1
            free += holes[right]
        if free >= size and right > left and moved <= max_moved and (best is None or moved < best[0]):
            best = (moved, left, right)
        if left < right:
            free -= holes[left]
            moved -= spans[left].end - spans[left].start
    if best is None:
        return None
    return _push_down(spans[best[1] : best[2]], ends[best[1]], starts[best[2]])


def _push_down(run: Sequence[Span], start: int, end: int) -> Compaction:
    shifts = []
    for span in run:
        if span.start != start:
            shifts.append(Shift(span.key, span.start, start))
        start += span.end - span.start
    return Compaction(tuple(shifts), start, end)
