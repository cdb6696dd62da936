"""The arena's extents: disjoint, coalescing, and room found at the least price."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
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
    place = extents.find(size * UNIT, prices.__getitem__, avoid=(low, high))
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
