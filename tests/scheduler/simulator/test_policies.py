"""What defines each policy, seen in its plans, and that none of them breaks the scheduler's rules."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from weft_scheduler import CostModel, LatencyTargets, Limits, Scheduler, SegmentKind, StepPlan
from weft_scheduler.policies import POLICIES, AlternatingPolicy, NoCoservingPolicy, Policy, StaticCapPolicy
from weft_scheduler.simulator.capacity import plan_replicas
from weft_scheduler.simulator.report import Slo
from weft_scheduler.simulator.simulation import Setup, Simulation, simulate
from weft_scheduler.simulator.trace import Trace
from weft_scheduler.training_policy import trickle_interval

Traces = Callable[..., Trace]
Setups = Callable[..., Setup]


def plans_of(trace: Trace, setup: Setup, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    plans: list[StepPlan] = []
    original = Scheduler.plan

    def spy(self: Scheduler, now: float) -> StepPlan:
        plan = original(self, now)
        if not plan.is_empty:
            plans.append(plan)
        return plan

    monkeypatch.setattr(Scheduler, "plan", spy)
    Simulation(trace, setup, policy).run(None)
    return plans


def generates(plan: StepPlan) -> bool:
    return any(segment.kind is not SegmentKind.TRAIN for segment in plan.forward)


def trains(plan: StepPlan) -> bool:
    has_windows = any(segment.kind is SegmentKind.TRAIN for segment in plan.forward)
    return bool(has_windows or plan.backward or plan.optimizer_steps)


def test_weft_mixes_both_in_one_iteration(
    make_trace: Traces, make_setup: Setups, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = plans_of(make_trace(40, 10.0), make_setup(), POLICIES["weft"](), monkeypatch)
    mixed = sum(generates(plan) and trains(plan) for plan in plans)
    assert mixed > 0.5 * sum(generates(plan) for plan in plans)


def test_alternating_never_mixes_and_keeps_the_pair_within_the_target(
    make_trace: Traces, make_setup: Setups, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make_setup(noise=0.0)
    plans = plans_of(make_trace(40, 10.0), setup, AlternatingPolicy(), monkeypatch)
    assert not any(generates(plan) and trains(plan) for plan in plans)
    pairs = [(a, b) for a, b in pairwise(plans) if generates(a) and trains(b)]
    assert len(pairs) > 20
    beyond = [
        b
        for a, b in pairs
        if a.predicted_s + b.predicted_s > setup.slo.tpot_s
        and len(b.backward) + len(b.forward) + len(b.optimizer_steps) > 1
        and any(segment.kind is SegmentKind.DECODE for segment in a.forward)
    ]
    assert beyond == []


def test_alternating_skips_turns_for_which_nothing_is_left(
    make_trace: Traces, make_setup: Setups, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make_setup(noise=0.0, slo=Slo(tpot_s=1e-4))
    plans = plans_of(make_trace(40, 10.0), setup, AlternatingPolicy(), monkeypatch)
    decoding = [i for i, a in enumerate(plans[:-1]) if any(s.kind is SegmentKind.DECODE for s in a.forward)]
    trained = sum(trains(plans[i + 1]) for i in decoding)
    assert 0 < trained <= 2 * len(decoding) / trickle_interval(setup.slo.percentile)


def test_a_static_cap_bounds_windows_and_layers_whatever_the_time(
    make_trace: Traces, make_setup: Setups, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make_setup(num_jobs=2, limits={"window_tokens": 128})
    policy = StaticCapPolicy(max_tokens=512, max_train_tokens=256, num_layers=2)
    plans = plans_of(make_trace(40, 10.0), setup, policy, monkeypatch)
    for plan in plans:
        windows = sum(s.num_tokens for s in plan.forward if s.kind is SegmentKind.TRAIN)
        prompts = sum(s.num_tokens for s in plan.forward if s.kind is SegmentKind.PREFILL)
        assert windows <= 256
        inference = plan.num_forward_tokens - windows
        assert inference <= 512 or not prompts
        assert inference < 512 or not windows
        layers = {part.layer for part in plan.backward}
        assert len(layers) <= 2
        assert not (windows and plan.backward)
    slices = {len(plan.backward) for plan in plans if plan.backward}
    assert max(slices) > 2, "whole layers, all their windows"


def test_without_coserving_finetuning_waits_for_silence(
    make_trace: Traces, make_setup: Setups, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = plans_of(make_trace(40, 2.0), make_setup(), NoCoservingPolicy(), monkeypatch)
    assert not any(generates(plan) and trains(plan) for plan in plans)
    assert any(trains(plan) for plan in plans)


def test_without_coserving_a_steady_stream_stops_finetuning(make_trace: Traces, make_setup: Setups) -> None:
    busy = make_trace(400, 60.0)
    alone = simulate(busy, make_setup(policy="no-coserving")).report
    shared = simulate(busy, make_setup(policy="weft")).report
    assert alone.trained_per_s < 0.25 * shared.trained_per_s


@pytest.mark.parametrize("cap", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_a_cap_of_nothing_is_refused(cap: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="each must be at least 1"):
        StaticCapPolicy(*cap)


def test_a_scheduler_runs_wefts_policy_unless_told_otherwise(make_limits: Callable[..., Limits]) -> None:
    scheduler = Scheduler(make_limits(), CostModel(), LatencyTargets(0.05, 1.0))
    assert type(scheduler._policy) is POLICIES["weft"]


def test_enough_replicas_are_found_and_fewer_would_not_do(make_trace: Traces, make_setup: Setups) -> None:
    trace = make_trace(400, 120.0)
    setup = make_setup(num_jobs=1, limits={"max_num_seqs": 16})
    tried = plan_replicas(trace, setup, max_replicas=16, dedicated_per_s=10_000.0, duration_s=None)
    enough = next(item for item in tried if item.is_enough)
    assert 1 < enough.num_replicas <= 16
    assert [item.num_replicas for item in tried] == sorted({item.num_replicas for item in tried})
    assert any(item.num_replicas == enough.num_replicas - 1 and not item.is_enough for item in tried)
    too_few = plan_replicas(trace, setup, max_replicas=1, dedicated_per_s=None, duration_s=None)
    assert [item.is_enough for item in too_few] == [False]
