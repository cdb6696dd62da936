"""The pace: follows spells in which everything takes longer, but neither single stumbles nor one odd kind."""

from __future__ import annotations

import random
from itertools import cycle, islice

import pytest

from weft_scheduler.pace import Pace


def after(ratios: list[float]) -> Pace:
    pace = Pace()
    for ratio in ratios:
        pace.observe(ratio)
    return pace


def test_the_pace_starts_at_the_usual_one() -> None:
    assert Pace().factor == 1.0


def test_one_stumble_hardly_moves_it() -> None:
    assert after([1.0] * 5 + [40.0]).factor < 1.04
    assert after([1.0] * 5 + [40.0, 30.0]).factor < 1.07


def test_a_slow_spell_is_believed_after_three_iterations() -> None:
    assert after([1.0] * 5 + [3.0] * 3).factor == pytest.approx(3.0, rel=0.1)


def test_the_end_of_a_slow_spell_is_believed_after_two() -> None:
    pace = after([3.0] * 10)
    pace.observe(1.0)
    assert pace.factor > 2.0
    pace.observe(1.0)
    assert pace.factor == pytest.approx(1.0, rel=0.05)


def test_one_kind_that_is_always_predicted_wrongly_moves_it_little() -> None:
    for wrong in (0.2, 5.0):
        ratios = list(islice(cycle([1.0, wrong, 1.0]), 300))
        assert after(ratios).factor == pytest.approx(1.0, rel=0.2)


def test_noise_averages_out() -> None:
    rng = random.Random(1)
    pace, factors = Pace(), []
    for _ in range(2000):
        pace.observe(rng.lognormvariate(0.0, 0.08))
        factors.append(pace.factor)
    assert min(factors) > 0.9
    assert max(factors) < 1.1


def test_a_lasting_change_is_left_to_the_fit() -> None:
    pace = after([2.0] * 10)
    for _ in range(100):
        pace.observe(1.0)
    assert pace.factor == pytest.approx(1.0, abs=1e-3)


def test_absurd_ratios_are_bounded() -> None:
    assert after([1e300] * 10).factor <= 16.0
    assert after([1e-300] * 10).factor >= 1.0 / 16.0


def test_resetting_forgets_what_was_seen() -> None:
    pace = after([3.0] * 10)
    pace.reset()
    assert pace.factor == 1.0
    pace.observe(3.0)
    assert pace.factor < 1.1
