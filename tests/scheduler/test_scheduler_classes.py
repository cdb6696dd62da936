"""Request classes: tiers, priorities, deadlines, concurrency, and how long a queue will take to drain."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from weft_scheduler import CostModel, LatencyTargets, Scheduler, SegmentKind, ServiceTier, StepPlan
from weft_scheduler.deadlines import Deadlines
from weft_scheduler.requests import Sequence, SequenceStatus

FLEX = ServiceTier.FLEX


def first_tokens(engine: Any) -> list[str]:
    """Requests in the order in which they got their first token."""
    begun = [name for name, request in engine.requests.items() if request.first_token_s is not None]
    return sorted(begun, key=lambda name: engine.requests[name].first_token_s)


# ---------------------------------------------------------------- order


def test_default_goes_before_flex_then_priority_then_arrival(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_num_seqs=1)
    for name, tier, priority in (
        ("d", FLEX, 0),
        ("c", FLEX, -5),
        ("b", ServiceTier.DEFAULT, 9),
        ("a", ServiceTier.DEFAULT, 1),
        ("e", FLEX, 0),
    ):
        engine.request(request_spec(name, tier=tier, priority=priority))
    engine.run()
    assert first_tokens(engine) == ["a", "b", "c", "d", "e"]


def test_a_tenants_priorities_do_not_push_others_out(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(num_blocks=12, inference_reserve_blocks=0)
    sizes = {"num_prompt_tokens": 4, "max_new_tokens": 30}
    engine.request(request_spec("modest", tenant="modest", **sizes))
    engine.request(request_spec("rude0", tenant="rude", priority=-1000, **sizes))
    engine.request(request_spec("rude1", tenant="rude", priority=-2000, **sizes))
    engine.run()
    victims = [name for plan in engine.plans for name in plan.memory.preempted]
    assert victims[0] == "rude0"
    assert "modest" not in victims
    engine.check_finished()


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_flex_is_preempted_before_default_whatever_their_ages(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any], max_inflight: int
) -> None:
    engine = make_engine(num_blocks=12, inference_reserve_blocks=0, max_inflight=max_inflight)
    sizes = {"num_prompt_tokens": 4, "max_new_tokens": 30}
    engine.request(request_spec("flex", tier=FLEX, tenant="other", **sizes))
    engine.request(request_spec("old", **sizes))
    engine.request(request_spec("young", **sizes))
    engine.run()
    victims = [name for plan in engine.plans for name in plan.memory.preempted]
    assert victims[0] == "flex"
    assert "old" not in victims
    engine.check_finished()


# ---------------------------------------------------------------- ageing


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32), num_flex=st.integers(1, 12))
def test_overdue_flex_gets_every_fourth_admission_of_its_tenant_and_no_more(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any], seed: int, num_flex: int
) -> None:
    """The bound: a flex request with k flex ones before it waits `max_flex_wait_s`, then 4 (k + 1) turns."""
    rng = random.Random(seed)
    engine = make_engine(seed, max_num_seqs=rng.choice((1, 3)), max_flex_wait_s=0.5)
    for idx in range(num_flex):
        engine.request(request_spec(f"flex{idx}", tier=FLEX, max_new_tokens=rng.randint(1, 3)))
    num_default = 0
    overdue_at = None
    for _ in range(3000):
        while engine.scheduler.num_waiting - num_flex < 8:
            num_default += 1
            engine.request(request_spec(f"d{num_default}", max_new_tokens=rng.randint(1, 3)))
        engine.step()
        if overdue_at is None and engine.now >= 0.5:
            overdue_at = len(first_tokens(engine))
        if all(engine.requests[f"flex{idx}"].first_token_s is not None for idx in range(num_flex)):
            break
    order = first_tokens(engine)
    turns = [idx for idx, name in enumerate(order) if name.startswith("flex")]
    assert len(turns) == num_flex
    assert overdue_at is not None
    slack = engine.limits.max_num_seqs
    assert turns[0] >= overdue_at - slack, "flex went before default while it was not overdue"
    for position, turn in enumerate(turns):
        assert turn <= overdue_at + 4 * (position + 1) + slack
    gaps = [later - earlier for earlier, later in pairwise(turns)]
    assert all(gap >= 4 - slack for gap in gaps)
    assert len(order) >= turns[-1]


def test_flex_alone_does_not_wait_to_age(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine()
    engine.request(request_spec("flex", tier=FLEX))
    engine.step()
    assert any(s.sequence_id == "flex" for s in engine.plans[-1].forward)


# ---------------------------------------------------------------- deadlines


def test_a_waiting_request_is_dropped_at_its_deadline(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_num_seqs=1)
    engine.request(request_spec("long", max_new_tokens=100))
    engine.request(request_spec("late", deadline_s=0.05))
    engine.run()
    assert list(engine.expired) == ["late"]
    assert not engine.expired["late"].tokens
    engine.check_finished()


@pytest.mark.parametrize("max_inflight", [1, 2, 3])
def test_a_running_request_is_stopped_at_its_deadline_and_its_blocks_are_freed(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any], max_inflight: int
) -> None:
    engine = make_engine(max_inflight=max_inflight)
    engine.request(request_spec("r", max_new_tokens=100, deadline_s=0.2))
    engine.run()
    assert 0 < len(engine.expired["r"].tokens) < 100
    assert engine.scheduler.num_blocks_held == 0
    assert not engine.scheduler.has_work()


def test_a_deadline_that_has_passed_at_arrival_costs_nothing(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine()
    engine.request(request_spec("late", deadline_s=-1.0))
    plan = engine.step()
    assert plan.is_empty
    assert plan.expired == ("late",)
    assert engine.step().expired == (), "told once"


def test_a_request_that_waits_for_its_adapter_expires_too(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(latency=lambda: 10.0)
    engine.request(request_spec("r", adapter="a", deadline_s=1.0))
    engine.run()
    assert list(engine.expired) == ["r"]
    assert engine.now < 12.0


def test_deadlines_of_ended_requests_are_forgotten(request_spec: Callable[..., Any]) -> None:
    deadlines = Deadlines()
    for idx in range(10_000):
        sequence = Sequence(request_spec(f"r{idx}", deadline_s=1e9 - idx), idx, 1, 0.0, 0.0)
        deadlines.add(sequence)
        sequence.status = SequenceStatus.FINISHED
        assert len(deadlines) <= 66
    assert deadlines.take_expired(1e10) == []


# ---------------------------------------------------------------- concurrency


def running_of(plan: Any, prefix: str) -> set[str]:
    return {
        s.sequence_id
        for s in plan.forward
        if s.kind is not SegmentKind.TRAIN and s.sequence_id.startswith(prefix)
    }


def test_a_tenants_concurrency_is_a_limit_and_others_use_the_rest(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_num_seqs=6)
    engine.scheduler.set_max_concurrency({"capped": 2})
    for idx in range(20):
        engine.request(request_spec(f"capped{idx}", tenant="capped"))
        engine.request(request_spec(f"free{idx}", tenant="free"))
    engine.run()
    assert max(len(running_of(plan, "capped")) for plan in engine.plans) == 2
    assert max(len(running_of(plan, "free")) for plan in engine.plans) >= 4
    engine.check_finished()


def test_concurrency_may_change_while_serving(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_num_seqs=6)
    for idx in range(40):
        engine.request(request_spec(f"r{idx}"))
    engine.scheduler.set_max_concurrency({"t": 1})
    for _ in range(10):
        engine.step()
    assert {len(running_of(plan, "r")) for plan in engine.plans if plan.forward} == {1}
    engine.scheduler.set_max_concurrency({})
    engine.step()
    assert len(running_of(engine.step(), "r")) > 3
    engine.run()


def test_a_concurrency_below_one_is_refused(
    make_limits: Callable[..., Any],
) -> None:
    scheduler = Scheduler(make_limits(), CostModel(), LatencyTargets(0.05, 2.0))
    with pytest.raises(ValueError, match="max_concurrency of t is 0"):
        scheduler.set_max_concurrency({"t": 0})


# ---------------------------------------------------------------- drain


@pytest.mark.parametrize("num_others", [0, 200])
@pytest.mark.parametrize("length", [1, 8, 25])
@pytest.mark.parametrize("max_num_seqs", [1, 8])
def test_the_predicted_drain_time_comes_true_within_a_factor_of_two(
    make_engine: Callable[..., Any],
    request_spec: Callable[..., Any],
    num_others: int,
    length: int,
    max_num_seqs: int,
) -> None:
    engine = make_engine(max_num_seqs=max_num_seqs, num_blocks=512)
    for idx in range(200):
        # They ask for much more than they will take, as most requests do.
        engine.request(request_spec(f"r{idx}", max_new_tokens=100), stop_after=length)
    for idx in range(num_others):
        engine.request(request_spec(f"o{idx}", tenant="other", max_new_tokens=100), stop_after=length)
    while engine.scheduler.queues(engine.now)["t"].num_waiting > 120:
        engine.step()
    asked_s, predicted_s = engine.now, engine.scheduler.queues(engine.now)["t"].drain_s
    while "t" in engine.scheduler.queues(engine.now):
        engine.step()
    took_s = engine.now - asked_s
    assert took_s / 2 <= predicted_s <= took_s * 2


def test_only_the_longest_queues_are_told(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine()
    for tenant, num in (("a", 3), ("b", 9), ("c", 5)):
        for idx in range(num):
            engine.request(request_spec(f"{tenant}{idx}", tenant=tenant))
    queues = engine.scheduler.queues(0.0, max_tenants=2)
    assert {tenant: queue.num_waiting for tenant, queue in queues.items()} == {"b": 9, "c": 5}
    assert all(queue.drain_s > 0.0 for queue in queues.values())


def test_finetuning_yields_to_flex_targets_while_there_are_flex_requests_alone(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(targets=LatencyTargets(0.02, 2.0))
    engine.train_endlessly("j", "trainer", [64])
    engine.request(request_spec("flex", tier=ServiceTier.FLEX, max_new_tokens=40))
    for _ in range(10):
        engine.step()
    flex_alone = [plan.budget_s for plan in engine.plans if has_decodes(plan)]
    engine.request(request_spec("default", max_new_tokens=10))
    for _ in range(5):
        engine.step()
    both = engine.plans[-1].budget_s
    while engine.requests["default"].finish_reason is None:
        engine.step()
    for _ in range(3):
        engine.step()
    assert flex_alone == [pytest.approx(0.9 * 4 * 0.02)] * len(flex_alone) != []
    assert both == pytest.approx(0.9 * 0.02)
    assert has_decodes(engine.plans[-1])
    assert engine.plans[-1].budget_s == pytest.approx(0.9 * 4 * 0.02)


def has_decodes(plan: StepPlan) -> bool:
    return any(segment.kind is SegmentKind.DECODE for segment in plan.forward)
