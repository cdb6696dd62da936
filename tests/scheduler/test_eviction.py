"""The eviction policy: what it remembers, and that it reloads less than recency alone on a skewed trace."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import defaultdict

import pytest

from weft_scheduler.eviction import DecayedFrequency, EvictionPolicy, reload_cost
from weft_scheduler.residency import Residency

UNIT = 1 << 20


class Recency:
    """Least recently used."""

    def __init__(self) -> None:
        self.now = 0
        self.last: dict[str, int] = {}

    def used(self, key: str) -> None:
        self.now += 1
        self.last[key] = self.now

    def value(self, key: str, num_elements: int) -> float:
        return float((1 + self.now - self.last.get(key, 0)) ** -8)


class Foresight:
    """Knows the trace: least reload cost per distance to the next use."""

    def __init__(self, keys: list[str]) -> None:
        self.now = -1
        self.uses: defaultdict[str, list[int]] = defaultdict(list)
        for idx, key in enumerate(keys):
            self.uses[key].append(idx)

    def used(self, key: str) -> None:
        self.now += 1

    def value(self, key: str, num_elements: int) -> float:
        uses = self.uses[key]
        idx = bisect_right(uses, self.now)
        return reload_cost(num_elements) / (uses[idx] - self.now) if idx < len(uses) else 0.0


def power_law_trace(num_uses: int, *, drifts: bool) -> tuple[list[str], dict[str, int]]:
    """874 adapters of ranks 8 to 64, the most popular with about 8 % of the uses."""
    rng = random.Random(7)
    weights = [(rank + 0.6) ** -0.94 for rank in range(1, 875)]
    adapters = [f"a{idx}" for idx in range(874)]
    sizes = {key: rng.choice((1, 2, 4, 8)) * UNIT for key in adapters}
    keys = []
    for idx in range(num_uses):
        if drifts and idx % 50 == 0:
            head, other = rng.randrange(50), rng.randrange(874)
            adapters[head], adapters[other] = adapters[other], adapters[head]
        keys.append(rng.choices(adapters, weights)[0])
    return keys, sizes


def elements_loaded(keys: list[str], sizes: dict[str, int], arena: int, policy: EvictionPolicy) -> int:
    """Replay one request after the other through an arena for `arena` adapters of mean size."""
    residency = Residency(256, arena * sum(sizes.values()) // len(sizes), 0.0, policy=policy)
    total = 0
    for idx, key in enumerate(keys):
        residency.advance(float(idx), idx)
        residency.want(key, sizes[key])
        if residency.slot(key) is None:
            entry = residency.entries[key]
            residency.fetch(entry)
            assert residency.fetched(key, sizes[key]) is None
            assert residency.try_load(entry, is_aged=True)
            residency.loaded(key)
            total += sizes[key]
        residency.acquire(key)
        residency.release(key, fence=0)
        residency.take_actions()
    return total


@pytest.mark.parametrize("drifts", [False, True])
def test_it_reloads_less_than_lru_and_at_most_1_3_times_as_much_as_a_clairvoyant_one(drifts: bool) -> None:
    keys, sizes = power_law_trace(6000, drifts=drifts)
    shipped = elements_loaded(keys, sizes, 32, DecayedFrequency())
    recency = elements_loaded(keys, sizes, 32, Recency())
    foresight = elements_loaded(keys, sizes, 32, Foresight(keys))
    assert shipped < 0.95 * recency
    assert shipped < 1.3 * foresight


def test_a_use_counts_half_after_as_many_others_as_the_half_life() -> None:
    policy = DecayedFrequency(half_life=8.0)
    policy.used("a")
    assert policy.rate("a") == 1.0
    for _ in range(8):
        policy.used("b")
    assert policy.rate("a") == pytest.approx(0.5)
    policy.used("a")
    assert policy.rate("a") == pytest.approx(1.0 + 0.5 * 0.5 ** (1 / 8))
    assert policy.rate("unknown") == policy.value("unknown", 64) == 0.0


def test_what_is_used_as_often_is_worth_more_when_its_reload_costs_more() -> None:
    policy = DecayedFrequency()
    policy.used("a")
    assert policy.value("a", 2 * UNIT) > policy.value("a", UNIT) > 0.0


def test_only_the_most_used_are_remembered_when_there_are_too_many() -> None:
    policy = DecayedFrequency(max_remembered=10)
    for _ in range(3):
        policy.used("popular")
    for idx in range(100):
        policy.used(f"rare{idx}")
    assert policy.rate("popular") > 2.0
    assert sum(policy.rate(f"rare{idx}") > 0.0 for idx in range(100)) <= 10


@pytest.mark.parametrize(("half_life", "max_remembered"), [(0.0, 8), (-1.0, 8), (8.0, 0)])
def test_numbers_that_are_not_positive_are_refused(half_life: float, max_remembered: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        DecayedFrequency(half_life, max_remembered)
