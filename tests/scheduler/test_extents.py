"""The arena's extents: disjoint, coalescing, and room found at the least price."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from weft_scheduler.extents import ExtentMap

UNIT = 64
CAPACITY = 16


def build(layout: list[tuple[int, float | None]]) -> tuple[ExtentMap, dict[str, float | None]]:
    """Extents of the given sizes (in units) from the bottom; a price of -1 leaves a hole."""
    extents, prices, offset = ExtentMap(CAPACITY * UNIT), {}, 0
    for idx, (size, price) in enumerate(layout):
        if offset + size > CAPACITY:
            break
        if price != -1:
            extents.insert(f"x{idx}", offset * UNIT, size * UNIT)
            prices[f"x{idx}"] = price
        offset += size
    return extents, prices


LAYOUTS = st.lists(
    st.tuples(st.integers(1, 5), st.sampled_from([None, -1, 1.0, 2.0, 5.0])), min_size=0, max_size=8
)


def cheapest(extents: ExtentMap, prices: dict[str, float | None], size: int, lowest: int) -> float | None:
    """The least price over every set of evictable extents that opens a hole, by trying them all."""
    spans = {key: (extents[key].start // UNIT, extents[key].end // UNIT) for key in prices}
    evictable = [key for key, price in prices.items() if price is not None]
    best = None
    for count in range(len(evictable) + 1):
        for victims in combinations(evictable, count):
            taken = {
                unit
                for key, (start, end) in spans.items()
                if key not in victims
                for unit in range(start, end)
            }
            fits = any(
                not taken & set(range(offset, offset + size)) for offset in range(lowest, CAPACITY - size + 1)
            )
            total = sum(prices[key] or 0.0 for key in victims)
            if fits and (best is None or total < best):
                best = total
    return best


def least_moved(extents: ExtentMap, prices: dict[str, float | None], size: int, lowest: int) -> int | None:
    """Units moved by the cheapest run of neighbours that gives enough room when it is pushed together."""
    spans = sorted((extents[key].start // UNIT, extents[key].end // UNIT, prices[key]) for key in prices)
    best = None
    for first, last in combinations(range(len(spans) + 1), 2):
        run = spans[first:last]
        if any(price is None or start < lowest for start, _, price in run):
            continue
        below = max(lowest, spans[first - 1][1] if first else 0)
        above = spans[last][0] if last < len(spans) else CAPACITY
        moved = sum(end - start for start, end, _ in run)
        if above - below - moved >= size and (best is None or moved < best):
            best = moved
    return best


@given(
    layout=LAYOUTS,
    size=st.integers(1, CAPACITY),
    lowest=st.sampled_from([0, 7]),
    max_moved=st.sampled_from([3, CAPACITY]),
)
def test_compaction_moves_least_stays_in_bounds_and_leaves_the_room(
    layout: list[tuple[int, float | None]], size: int, lowest: int, max_moved: int
) -> None:
    extents, prices = build(layout)
    movable = {key for key, price in prices.items() if price is not None}
    before = {key: extents[key] for key in extents}
    assume(extents.find(size * UNIT, lambda _: None, lowest=lowest * UNIT) is None)
    found = extents.find_compaction(
        size * UNIT, movable.__contains__, max_moved=max_moved * UNIT, lowest=lowest * UNIT
    )
    least = least_moved(extents, prices, size, lowest)
    if least is None or least > max_moved:
        assert found is None
        return
    assert found is not None
    moved = {shift.key for shift in found.shifts}
    assert moved <= movable
    assert sum(before[key].end - before[key].start for key in moved) <= least * UNIT
    for shift in found.shifts:
        assert extents[shift.key].start == shift.source > shift.destination >= lowest * UNIT
        extents.move(shift.key, shift.destination)
        extents.check_invariants()
    assert all(extents[key] == before[key] for key in before if key not in moved)
    assert found.end - found.start >= size * UNIT
    extents.insert("new", found.start, found.end - found.start)


def test_a_move_onto_another_extent_is_refused_and_changes_nothing() -> None:
    extents, _ = build([(2, 1.0), (1, -1), (2, 1.0)])
    with pytest.raises(ValueError, match="does not fit"):
        extents.move("x2", UNIT)
    extents.check_invariants()
    assert extents["x2"].start == 3 * UNIT
    extents.move("x2", 2 * UNIT)
    assert extents["x2"].start == 2 * UNIT


@given(layout=LAYOUTS, size=st.integers(1, CAPACITY), lowest=st.sampled_from([0, 7]), from_top=st.booleans())
def test_room_is_found_at_the_least_price_that_any_choice_of_victims_has(
    layout: list[tuple[int, float | None]], size: int, lowest: int, from_top: bool
) -> None:
    extents, prices = build(layout)
    place = extents.find(size * UNIT, prices.__getitem__, lowest=lowest * UNIT, from_top=from_top)
    best = cheapest(extents, prices, size, lowest)
    assert (place is None) == (best is None)
    if place is None:
        return
    assert place.cost == best
    assert place.offset >= lowest * UNIT
    for key in place.victims:
        assert prices[key] is not None
        extents.remove(key)
    extents.insert("new", place.offset, size * UNIT)
    extents.check_invariants()


@given(layout=LAYOUTS, size=st.integers(1, 8), start=st.integers(0, 8), length=st.integers(1, 8))
def test_the_area_to_avoid_is_never_touched(
    layout: list[tuple[int, float | None]], size: int, start: int, length: int
) -> None:
    extents, prices = build(layout)
    inside = [extents[key] for key in prices]
    touched = [e for e in inside if e.start < (start + length) * UNIT and start * UNIT < e.end]
    low = min([e.start for e in touched] + [start * UNIT])
    high = max([e.end for e in touched] + [(start + length) * UNIT])
    place = extents.find(size * UNIT, prices.__getitem__, avoid=[(low, high)])
    if place is not None:
        assert place.offset + size * UNIT <= low or high <= place.offset
        assert not {e.key for e in touched} & set(place.victims)


def test_neighbouring_holes_are_one_hole() -> None:
    extents = ExtentMap(4 * UNIT)
    for idx in range(4):
        extents.insert(f"x{idx}", idx * UNIT, UNIT)
    extents.remove("x1")
    extents.remove("x2")
    place = extents.find(2 * UNIT, lambda _: None)
    assert place is not None
    assert place.offset == UNIT


def test_overlapping_or_unaligned_extents_are_refused() -> None:
    extents = ExtentMap(4 * UNIT + 5)
    extents.insert("x", UNIT, UNIT + 1)
    for offset, size in ((0, UNIT + 1), (2 * UNIT, UNIT), (3, 1), (3 * UNIT, 2 * UNIT), (-UNIT, UNIT)):
        with pytest.raises(ValueError, match="does not fit"):
            extents.insert("y", offset, size)
    with pytest.raises(ValueError, match="does not fit"):
        extents.insert("x", 3 * UNIT, UNIT)
    extents.check_invariants()
