"""Simulations are reproducible, lose nothing, and measure what happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft_scheduler.cost import CostModel
from weft_scheduler.features import PlanFeatures
from weft_scheduler.plan import StepPlan
from weft_scheduler.policies import POLICIES
from weft_scheduler.simulator.device import SimulatedDevice
from weft_scheduler.simulator.device_model import Work
from weft_scheduler.simulator.jobs import JobSpec, SimulatedJob, pack_lengths
from weft_scheduler.simulator.report import (
    Percentiles,
    RequestRecord,
    Slo,
    jain_index,
    weighted_percentiles,
)
from weft_scheduler.simulator.simulation import (
    Setup,
    Simulation,
    dedicated_rate,
    simulate,
    simulate_with_dedicated,
)
from weft_scheduler.simulator.trace import Trace, TraceRequest

COUNTED_ALIKE = (
    "forward_tokens",
    "kv_tokens_read",
    "attention_products",
    "num_sequences",
    "loss_tokens",
    "num_loss_windows",
    "backward_token_layers",
    "num_backward_slices",
    "num_backward_layers",
    "optimizer_steps",
)
Traces = Callable[..., Trace]
Setups = Callable[..., Setup]


def test_the_same_seed_gives_the_same_report(make_trace: Traces, make_setup: Setups) -> None:
    trace = make_trace(60, 8.0, adapters=9)
    setup = make_setup(adapters=9, num_jobs=2, timeline_s=(1.0, 2.0))
    first, second = simulate(trace, setup), simulate(trace, setup)
    assert first.report == second.report
    assert first.samples == second.samples
    assert first.timeline.iterations == second.timeline.iterations
    assert simulate(trace, replace(setup, seed=1)).report != first.report


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_blocks", [2048, 500])
def test_every_request_ends_with_its_tokens(
    policy: str, num_blocks: int, make_trace: Traces, make_setup: Setups
) -> None:
    trace = make_trace(80, 30.0, adapters=40)
    limits = {
        "num_blocks": num_blocks,
        "inference_reserve_blocks": 100,
        "max_model_len": 2048,
        "max_train_tokens": 4096,
        "arena_elements": 40_000_000,
        "window_tokens": 256,
    }
    setup = make_setup(adapters=40, num_jobs=2, policy=policy, limits=limits)
    simulation = Simulation(trace, setup, POLICIES[policy]())
    result = simulation.run(None)
    records = simulation._recorder.records
    assert result.report.num_finished == len(trace) == len(records)
    for idx, request in enumerate(trace):
        record = records[f"r{idx}"]
        assert record.num_tokens == request.num_output_tokens
        assert record.first_token_s is not None
        assert record.finished_s is not None
        assert request.arrival_s < record.first_token_s <= record.finished_s
    assert result.report.generated_per_s * result.report.duration_s == pytest.approx(
        sum(request.num_output_tokens for request in trace)
    )
    simulation._scheduler.check_invariants()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 60)), min_size=1, max_size=25),
    rate=st.floats(0.5, 200.0),
    policy=st.sampled_from(sorted(POLICIES)),
    num_blocks=st.integers(200, 400),
    num_jobs=st.integers(0, 3),
)
def test_nothing_is_lost_whatever_the_load(
    make_setup: Setups,
    lengths: list[tuple[int, int]],
    rate: float,
    policy: str,
    num_blocks: int,
    num_jobs: int,
) -> None:
    trace = tuple(
        TraceRequest(idx / rate, prompt, output, f"tenant-{idx % 3}")
        for idx, (prompt, output) in enumerate(lengths)
    )
    limits = {
        "num_blocks": num_blocks,
        "inference_reserve_blocks": 64,
        "max_model_len": 2000,
        "max_train_tokens": 2000,
        "window_tokens": 256,
    }
    report = simulate(trace, make_setup(num_jobs=num_jobs, policy=policy, limits=limits)).report
    assert report.num_finished == len(trace)


def test_a_job_that_ends_trains_exactly_its_tokens(make_setup: Setups) -> None:
    job = JobSpec("job-0", "trainer", batch_size=4, example_tokens=200, num_steps=5)
    setup = make_setup(jobs=(job,))
    twin = SimulatedJob(job, max_pack_tokens=4096, seed=setup.seed)
    tokens = sum(pack.num_tokens for _ in range(5) for pack in twin.next_step())
    report = simulate((), setup).report
    assert report.num_steps == 5
    assert report.trained_tokens == pytest.approx(tokens)
    assert report.trained_by_tenant == {"trainer": pytest.approx(tokens)}


def test_dropped_packs_are_not_counted_twice(make_setup: Setups) -> None:
    job = JobSpec("job-0", "trainer", batch_size=48, example_tokens=500, num_steps=10)
    limits = {
        "num_blocks": 1100,
        "inference_reserve_blocks": 8,
        "max_model_len": 2048,
        "max_train_tokens": 24576,
    }
    setup = make_setup(jobs=(job,), limits=limits)
    prompts = [TraceRequest(0.2 + idx / 5, 1800, 10) for idx in range(8)]
    report = simulate((*prompts, TraceRequest(1000.0, 1, 1)), setup).report
    assert report.num_packs_dropped > 0
    twin = SimulatedJob(job, max_pack_tokens=setup.limits.max_pack_tokens, seed=setup.seed)
    tokens = sum(pack.num_tokens for _ in range(10) for pack in twin.next_step())
    assert report.trained_tokens == pytest.approx(tokens)


def test_kept_is_a_part_of_what_the_jobs_reach_alone(make_trace: Traces, make_setup: Setups) -> None:
    setup = make_setup()
    report = simulate_with_dedicated(make_trace(100, 10.0), setup).report
    assert report.dedicated_per_s == dedicated_rate(setup)
    assert 0.2 < (report.kept or 0.0) < 1.02
    assert simulate_with_dedicated(make_trace(5, 10.0), make_setup(num_jobs=0)).report.kept is None


def test_a_cost_model_that_is_wrong_is_corrected(make_trace: Traces, make_setup: Setups) -> None:
    from weft_scheduler import CostModel, PlanFeatures

    beliefs = CostModel()
    beliefs.calibrate([(PlanFeatures(forward_tokens=16), 0.0002)])
    report = simulate(make_trace(200, 10.0), make_setup(beliefs=beliefs)).report
    assert report.cost_error_p50 < 0.15
    assert (report.gap.p95 or 1.0) < 0.07


def test_a_duration_ends_endless_jobs_and_nothing_else_does(make_setup: Setups) -> None:
    report = simulate((), make_setup(), duration_s=3.0).report
    assert (report.duration_s, report.num_requests) == (3.0, 0)
    assert report.trained_per_s > 0.0
    with pytest.raises(ValueError, match="give a duration"):
        simulate((), make_setup())


def test_an_adapter_that_can_never_fit_refuses_its_requests(make_trace: Traces, make_setup: Setups) -> None:
    trace = make_trace(10, 10.0, adapters=1)
    setup = make_setup(adapters=1, num_jobs=0, limits={"arena_elements": 64 * 100})
    report = simulate(trace, setup).report
    assert (report.num_finished, report.attainment) == (0, 0.0)


def test_hot_adapters_are_on_the_device_when_asked_for(make_trace: Traces, make_setup: Setups) -> None:
    report = simulate(make_trace(80, 5.0, adapters=2), make_setup(adapters=2)).report
    assert (report.adapter_hit_rate or 0.0) > 0.9
    assert report.num_adapter_loads == 3


def test_shared_prefixes_are_computed_once(make_setup: Setups) -> None:
    shared = tuple(TraceRequest(idx * 1.0, 1100, 5, prefix_hashes=(1, 2, 3 + idx)) for idx in range(10))
    report = simulate(shared, make_setup(num_jobs=0)).report
    assert report.prefix_hit_rate == pytest.approx(9 * 1024 / (10 * 1100), abs=0.02)
    other_tenants = tuple(replace(request, tenant=f"t{idx}") for idx, request in enumerate(shared))
    assert simulate(other_tenants, make_setup(num_jobs=0)).report.prefix_hit_rate == 0.0
    plain = tuple(replace(request, prefix_hashes=()) for request in shared)
    assert simulate(plain, make_setup(num_jobs=0)).report.prefix_hit_rate is None


def test_the_timeline_holds_every_token_of_its_window(make_trace: Traces, make_setup: Setups) -> None:
    trace = make_trace(40, 20.0)
    result = simulate(trace, make_setup(timeline_s=(0.0, 1e9)))
    iterations = result.timeline.iterations
    assert len(iterations) == result.report.num_iterations
    assert all(a.end_s <= b.start_s + 1e-9 for a, b in pairwise(iterations))
    kinds = dict.fromkeys(("decode", "prefill", "train", "backward"), 0.0)
    for iteration in iterations:
        for part in iteration.parts:
            kinds[part.kind] += part.tokens
    assert kinds["prefill"] >= sum(request.num_prompt_tokens for request in trace)
    assert kinds["backward"] >= result.report.trained_tokens * (1 - 1e-9)
    empty = simulate(trace, make_setup()).timeline.iterations
    assert empty == []


def test_an_arrival_ends_the_backward_of_an_iteration(
    make_setup: Setups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where plans are made one by one; what has not run is trained later."""
    trace = tuple(TraceRequest(1.0 + 0.61 * idx, 8, 1) for idx in range(20))
    setup = make_setup(num_jobs=1, limits={"max_inflight": 1, "window_tokens": 256})
    stopping = simulate(trace, setup).report
    monkeypatch.setattr(Simulation, "_stop_s", lambda *_: None)
    patient = simulate(trace, setup).report
    assert stopping.num_finished == patient.num_finished == 20
    assert stopping.ttft.p95 is not None
    assert patient.ttft.p95 is not None
    assert stopping.ttft.p95 < 0.8 * patient.ttft.p95
    assert stopping.trained_per_s > 0.95 * patient.trained_per_s


def test_packs_hold_examples_in_order_up_to_their_size() -> None:
    assert pack_lengths([300, 300, 500, 100, 900], 1000) == [600, 600, 900]
    assert pack_lengths([2000, 10], 1000) == [2000, 10]


@pytest.mark.parametrize("field", ["batch_size", "example_tokens", "num_steps", "rank"])
def test_a_job_without_work_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is 0"):
        JobSpec("job", **{field: 0})


def test_percentiles_are_nearest_ranks() -> None:
    assert Percentiles.of(range(1, 101)) == Percentiles(50, 95, 99)
    assert Percentiles.of([]) == Percentiles(None, None, None)
    assert weighted_percentiles([(1.0, 94), (2.0, 4), (3.0, 2)]) == Percentiles(1.0, 2.0, 3.0)


def test_jains_index_is_one_for_equals_and_one_over_n_for_one_taker() -> None:
    assert jain_index([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain_index([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain_index([]) == 1.0


def test_a_request_attains_only_with_both_targets_and_its_end() -> None:
    record = RequestRecord("t", 1.0, 10, 3, num_tokens=3, first_token_s=2.0, finished_s=2.125)
    assert record.attains(Slo(0.0625, 1.0))
    assert not record.attains(Slo(0.062, 1.0))
    assert not record.attains(Slo(0.0625, 0.9))
    record.finished_s = None
    assert not record.attains(Slo(0.0625, 1.0))


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_the_scheduler_counts_the_work_that_the_device_finds_in_its_plans(
    max_inflight: int, make_trace: Traces, make_setup: Setups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one plan at a time arrivals end some of them: then what has run is counted."""
    found, believed = [], []
    run, observe = SimulatedDevice.run, CostModel.observe

    def recording_run(
        self: SimulatedDevice, plan: StepPlan, *rest: Any
    ) -> tuple[dict[str, int], float, Work]:
        result = run(self, plan, *rest)
        found.append([getattr(result[2], name) for name in COUNTED_ALIKE])
        return result

    def recording_observe(self: CostModel, features: PlanFeatures, elapsed_s: float) -> None:
        believed.append([getattr(features, name) for name in COUNTED_ALIKE])
        observe(self, features, elapsed_s)

    monkeypatch.setattr(SimulatedDevice, "run", recording_run)
    monkeypatch.setattr(CostModel, "observe", recording_observe)
    simulate(make_trace(40, 8.0), make_setup(num_jobs=2, limits={"max_inflight": max_inflight}))
    assert sorted(found) == sorted(believed)
    for name in ("num_loss_windows", "num_backward_layers"):
        counts = {row[COUNTED_ALIKE.index(name)] for row in found}
        assert len(counts - {0}) > 1, name
