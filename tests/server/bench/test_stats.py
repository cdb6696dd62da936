"""Percentiles, turns, ratios, thread sweeps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from weft_server.bench.stats import (
    Stopwatch,
    best_threads,
    interleave,
    median_ratio,
    percentile,
    sweep_threads,
    thread_candidates,
)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("percent", [0.0, 12.5, 50.0, 95.0, 99.0, 100.0])
@pytest.mark.parametrize("num", [1, 2, 7, 100])
def test_percentiles_are_numpys(percent: float, num: int) -> None:
    values = np.random.default_rng(num).normal(size=num).tolist()
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


@pytest.mark.parametrize(("values", "percent"), [([], 50.0), ([1.0], 101.0), ([1.0], -1.0)])
def test_a_percentile_of_nothing_is_refused(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, percent)


def test_rivals_take_turns_in_going_first() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = interleave(calls, lambda call: call() or 1.0, budget_s=0.0, min_rounds=3, warm_ups=1)
    assert order[:3] == ["a", "b", "c"], "the unmeasured calls"
    assert order[3:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert timings == {name: [1.0] * 3 for name in "abc"}


def test_a_ratio_compares_within_rounds() -> None:
    # The machine slows down tenfold: the medians' ratio would be 2.75, each round's is 2 or 3.
    assert median_ratio([2.0, 20.0, 60.0], [1.0, 10.0, 20.0]) == 2.0


def test_a_stopwatch_counts_the_call_alone() -> None:
    called: list[int] = []
    seconds = Stopwatch(torch.device("cpu"), cold=True).seconds(lambda: called.append(1))
    assert called == [1]
    assert 0.0 <= seconds < 0.1


@pytest.mark.usefixtures("threads")
def test_the_best_number_of_threads_stays_set() -> None:
    seconds = sweep_threads(lambda: abs(torch.get_num_threads() - 2) + 0.5, [1, 2, 4])
    assert seconds == {1: 1.5, 2: 0.5, 4: 2.5}
    assert best_threads(seconds) == torch.get_num_threads() == 2


@pytest.mark.parametrize(("cores", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_threads_are_tried_up_to_all_cores(cores: int, expected: list[int]) -> None:
    assert thread_candidates(cores) == expected
