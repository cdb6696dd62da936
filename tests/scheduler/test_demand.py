"""The rate of decoded tokens: what it is under a steady load, and how it is forgotten."""

from __future__ import annotations

import pytest

from weft_scheduler.demand import MEMORY_S, DecodeDemand


def test_a_steady_rate_is_found_whatever_the_batches() -> None:
    for batch, interval_s in ((1, 0.01), (8, 0.08)):
        demand, now_s = DecodeDemand(), 5.0
        for _ in range(int(8 * MEMORY_S / interval_s)):
            now_s += interval_s
            demand.add(batch, now_s)
        assert demand.tokens_per_s(now_s) == pytest.approx(100.0, rel=0.02)
        assert demand.tokens_per_s(now_s + MEMORY_S) == pytest.approx(36.8, rel=0.02)


def test_nothing_is_decoded_at_first_and_time_does_not_run_backwards() -> None:
    demand = DecodeDemand()
    assert demand.tokens_per_s(1e6) == 0.0
    demand.add(3, 10.0)
    assert demand.tokens_per_s(9.0) == pytest.approx(3 / MEMORY_S)
