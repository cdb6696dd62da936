"""Start-time fair queueing: shares follow weights, idleness is not banked."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft_scheduler.fairness import FairQueue


def serve(queue: FairQueue, flows: list[str], price: float) -> str:
    """Serve the flow with the smallest tag, all of `flows` being backlogged."""
    queue.advance(flows)
    flow = min(flows, key=queue.tag)
    queue.charge(flow, price)
    return flow


def test_backlogged_flows_share_by_weight() -> None:
    queue = FairQueue()
    queue.set_weight("heavy", 3.0)
    served = [serve(queue, ["heavy", "light"], 1.0) for _ in range(400)]
    assert served.count("heavy") == pytest.approx(300, abs=2)


@given(seed=st.integers(0, 2**32))
def test_backlogged_flows_differ_by_at_most_one_price_each_however_prices_vary(seed: int) -> None:
    rng, queue = random.Random(seed), FairQueue()
    received = {"a": 0.0, "b": 0.0}
    for _ in range(200):
        price = rng.uniform(0.1, 5.0)
        received[serve(queue, ["a", "b"], price)] += price
        assert abs(received["a"] - received["b"]) <= 10.0


def test_a_flow_that_returns_has_not_saved_up_its_idle_time() -> None:
    queue = FairQueue()
    queue.activate("busy")
    for _ in range(100):
        serve(queue, ["busy"], 1.0)
    queue.activate("back")
    served = [serve(queue, ["busy", "back"], 1.0) for _ in range(20)]
    assert served.count("back") <= 11


def test_service_without_a_backlog_is_not_held_against_anyone() -> None:
    queue = FairQueue()
    queue.charge("early", 50.0)
    queue.advance([])
    queue.activate("late")
    served = [serve(queue, ["early", "late"], 1.0) for _ in range(20)]
    assert served.count("early") in (9, 10, 11)


def test_flows_that_left_are_forgotten() -> None:
    queue = FairQueue()
    for idx in range(10_000):
        queue.charge(f"t{idx}", 1.0)
        queue.advance([])
    assert len(queue._tags) <= 4097


def test_a_weight_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight of t is 0.0; it must be a positive, finite number"):
        FairQueue().set_weight("t", 0.0)
