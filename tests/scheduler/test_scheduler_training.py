"""Finetuning through the scheduler: exact order, drops at layer boundaries, never starved."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from weft_scheduler import CostModel, LatencyTargets, PackSpec, Scheduler, SegmentKind, StepResult
from weft_scheduler.requests import RequestTooLarge
from weft_scheduler.training_policy import trickle_interval

TIGHT = LatencyTargets(tpot_s=0.0105, ttft_s=2.0)


def units(plan: Any) -> int:
    windows = sum(s.kind is SegmentKind.TRAIN for s in plan.forward)
    return windows + len(plan.backward) + len(plan.optimizer_steps)


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_a_step_runs_forward_then_backward_then_the_optimizer(
    make_engine: Callable[..., Any], max_inflight: int
) -> None:
    engine = make_engine(max_inflight=max_inflight)
    engine.add_job("j", 64)
    engine.add_step("j", "t", [20, 8, 3])
    engine.run()
    assert all(record.is_done for record in engine.packs.values())
    assert engine.steps_done["j"] == 1
    assert engine.scheduler.num_blocks_held == 0
    assert sum(len(plan.optimizer_steps) for plan in engine.plans) == 1


def test_a_wave_uses_what_the_budget_leaves_while_other_packs_are_forwarded(
    make_engine: Callable[..., Any],
) -> None:
    """The rows of a plan end before the second pack does; time is left."""
    engine = make_engine()
    for job in ("a", "b"):
        engine.add_job(job, 64)
    while any(engine.scheduler.adapter_slot(f"job:{job}") is None for job in ("a", "b")):
        engine.step()
    engine.add_step("a", "a", [8])
    engine.add_step("b", "b", [72])
    plan = engine.step()
    assert plan.num_forward_tokens == engine.limits.max_batch_tokens == 64
    assert {part.pack_ids for part in plan.backward} == {("a/0/0",)}
    engine.run()
    assert all(record.is_done for record in engine.packs.values())


def test_packs_of_several_jobs_descend_in_one_wave(make_engine: Callable[..., Any]) -> None:
    engine = make_engine()
    for job in ("a", "b"):
        engine.add_job(job, 64)
        engine.add_step(job, job, [16])
    engine.run()
    parts = [part for plan in engine.plans for part in plan.backward]
    assert {part.pack_ids for part in parts} == {("a/0/0", "b/0/0")}
    assert [(part.layer, part.window) for part in parts] == [(2, 1), (2, 0), (1, 1), (1, 0), (0, 1), (0, 0)]


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_jobs_that_start_at_different_times_fall_into_step(
    make_engine: Callable[..., Any], max_inflight: int
) -> None:
    engine = make_engine(num_adapter_slots=8, max_inflight=max_inflight)
    for delay, job in enumerate(("a", "b", "c")):
        engine.add_job(job, 64)
        for _ in range(3 + delay):
            engine.step()
    for _ in range(60):
        for job in ("a", "b", "c"):
            if not engine.job_has_work(job):
                engine.add_step(job, job, [16])
        engine.step()
    widths = [len(part.pack_ids) for plan in engine.plans[30:] for part in plan.backward]
    assert set(widths) == {3}
    assert min(engine.steps_done.values()) >= 10


def test_decodes_come_first_and_finetuning_takes_what_the_budget_leaves(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(targets=LatencyTargets(0.02, 2.0), num_layers=100)
    engine.add_job("j", 64)
    engine.request(request_spec("r", max_new_tokens=60))
    while not any(s.kind is SegmentKind.DECODE for s in engine.step().forward):
        pass
    engine.add_step("j", "t", [64])
    while engine.requests["r"].finish_reason is None:
        plan = engine.step()
        if engine.requests["r"].finish_reason is None:
            assert plan.forward[0].kind is SegmentKind.DECODE
            assert plan.predicted_s <= plan.budget_s
    assert sum(units(plan) for plan in engine.plans) > 800
    assert max(units(plan) for plan in engine.plans) < 400
    engine.run()
    assert engine.steps_done["j"] == 1


@pytest.mark.parametrize(("percentile", "expected_interval"), [(50.0, 8), (95.0, 24), (99.0, 120)])
def test_finetuning_trickles_while_decodes_alone_exceed_the_budget(
    make_engine: Callable[..., Any],
    request_spec: Callable[..., Any],
    percentile: float,
    expected_interval: int,
) -> None:
    engine = make_engine(targets=LatencyTargets(0.005, 2.0, percentile), max_model_len=256)
    engine.add_job("j", 64)
    engine.request(request_spec("r", max_new_tokens=160))
    while not any(s.kind is SegmentKind.DECODE for s in engine.step().forward):
        pass
    first = len(engine.plans)
    engine.add_step("j", "t", [16, 16])
    while engine.requests["r"].finish_reason is None:
        engine.step()
    pattern = [units(plan) for plan in engine.plans[first:-1]]
    assert set(pattern) == {0, 1}
    interval = trickle_interval(percentile)
    assert sum(pattern) >= len(pattern) // interval - 1 or engine.steps_done["j"] == 1
    gaps = [idx for idx, count in enumerate(pattern) if count]
    assert all(later - earlier >= interval for earlier, later in pairwise(gaps))
    assert interval == expected_interval


def with_dear_windows(engine: Any, loss_window_s: float) -> Any:
    """The engine, on which an iteration takes 10 ms and 1 ms a token, a window with a loss `loss_window_s`
    more, and backward nothing.
    """
    values = CostModel().to_dict()
    weights = dict.fromkeys(values["weights"], 0.0) | {"num_loss_windows": loss_window_s}
    curve = {knot: 0.01 + int(knot) / 1000 for knot in values["curve"]}
    cost = CostModel.from_dict({"curve": curve, "weights": weights})
    engine.scheduler.cost = engine.scheduler._state.cost = cost
    engine.train_endlessly("j", "t", [128] * 4)
    return engine


def windows_beside_decodes(engine: Any) -> int:
    """How many of the last plan's segments, which decodes, are windows."""
    kinds = [segment.kind for segment in engine.plans[-1].forward]
    return kinds.count(SegmentKind.TRAIN) if SegmentKind.DECODE in kinds else 0


@pytest.mark.parametrize("loss_window_s", [0.0, 0.035], ids=["cheap", "dear"])
@pytest.mark.parametrize("pause_s", [0.0, 4.0], ids=["busy", "idle-at-times"])
def test_windows_that_are_dear_beside_requests_wait_while_there_is_time_without_any(
    make_engine: Callable[..., Any],
    request_spec: Callable[..., Any],
    loss_window_s: float,
    pause_s: float,
) -> None:
    engine = make_engine(
        targets=LatencyTargets(0.07, 2.0),
        num_blocks=900,
        max_batch_tokens=192,
        max_train_tokens=600,
        noise=0.0,
    )
    with_dear_windows(engine, loss_window_s)
    counts = []
    for idx in range(30):
        engine.request(request_spec(f"r{idx}", num_prompt_tokens=4, max_new_tokens=20))
        count = 0
        while engine.requests[f"r{idx}"].finish_reason is None:
            engine.step()
            count += windows_beside_decodes(engine)
        counts.append(count)
        until_s = engine.now + pause_s
        while engine.now < until_s:
            engine.step()
    if loss_window_s and pause_s:
        assert sum(counts) == 0
    elif loss_window_s:
        assert counts[0] == 0
        assert min(counts[-5:]) > 0, "no such time is in sight: they wait no longer"
    else:
        assert sum(counts) > 20


def test_a_flood_of_prompts_that_fills_every_batch_leaves_the_trickle_its_window(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(targets=LatencyTargets(0.005, 2.0), num_blocks=256, max_batch_tokens=32)
    engine.add_job("j", 64)
    engine.add_step("j", "t", [8])
    num_requests = 0
    while engine.steps_done["j"] == 0:
        while engine.scheduler.num_waiting < 8:
            num_requests += 1
            engine.request(request_spec(f"r{num_requests}", num_prompt_tokens=40, max_new_tokens=2))
        engine.step()
        assert len(engine.plans) < 200
    assert num_requests > 10


def test_the_budget_opens_when_nobody_waits_for_tokens(make_engine: Callable[..., Any]) -> None:
    engine = make_engine(targets=LatencyTargets(0.012, 2.0), num_layers=64, num_blocks=64)
    engine.add_job("j", 64)
    engine.add_step("j", "t", [64])
    engine.run()
    training = [plan for plan in engine.plans if plan.backward]
    assert training[0].budget_s == 0.5
    assert max(plan.predicted_s for plan in training) > 0.02


def test_one_unit_runs_even_if_it_alone_exceeds_the_open_budget(make_engine: Callable[..., Any]) -> None:
    engine = make_engine(targets=LatencyTargets(1e-6, 1e-6))
    engine.add_job("j", 64)
    engine.add_step("j", "t", [16])
    engine.run()
    assert engine.steps_done["j"] == 1
    assert {units(plan) for plan in engine.plans if not plan.is_empty} == {1}


def test_packs_alive_stay_within_the_activation_limit(make_engine: Callable[..., Any]) -> None:
    engine = make_engine(max_train_tokens=32, max_inflight=2)
    engine.add_job("j", 64)
    engine.add_step("j", "t", [16] * 6)
    while engine.scheduler.has_work():
        engine.step()
        alive = [r for r in engine.packs.values() if r.num_forwarded and not r.is_done]
        assert sum(record.spec.num_tokens for record in alive) <= 32
    assert engine.steps_done["j"] == 1


@pytest.mark.parametrize(("max_kept_tokens", "num_keeping"), [(0, 0), (31, 1), (32, 2), (96, 6)])
def test_packs_keep_their_activations_while_there_is_room_and_recompute_beyond(
    make_engine: Callable[..., Any], max_kept_tokens: int, num_keeping: int
) -> None:
    """Six packs of 16 tokens are admitted at once, in a pipeline of two plans; then six more."""
    engine = make_engine(max_train_tokens=96, max_kept_tokens=max_kept_tokens, max_inflight=2)
    engine.add_job("j", 64)
    engine.add_step("j", "t", [16] * 12)
    most = 0
    while engine.scheduler.has_work():
        engine.step()
        alive = [r for r in engine.packs.values() if r.num_forwarded and not r.is_done]
        most = max(most, sum(record.keeps_activations for record in alive))
        assert sum(r.spec.num_tokens for r in alive if r.keeps_activations) <= max_kept_tokens
    assert most == num_keeping
    assert engine.steps_done["j"] == 1


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_arriving_requests_take_the_blocks_of_packs_which_resume_where_they_were(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any], max_inflight: int
) -> None:
    slack = LatencyTargets(tpot_s=0.01135, ttft_s=2.0)  # leaves about two slices beside a decode
    engine = make_engine(
        targets=slack,
        noise=0.0,
        num_blocks=40,
        max_model_len=256,
        inference_reserve_blocks=2,
        num_layers=12,
        max_inflight=max_inflight,
    )
    engine.add_job("j", 64)
    engine.request(request_spec("r0", num_prompt_tokens=2, max_new_tokens=150))
    while not any(s.kind is SegmentKind.DECODE for s in engine.step().forward):
        pass
    engine.add_step("j", "t", [60])
    record = engine.packs["j/0/0"]
    num_requests = 0
    while not record.is_done:
        if len(record.slices) > 8 * (1 + record.num_drops) and record.num_drops < 3:
            num_requests += 1
            num_free = 40 - engine.scheduler.num_blocks_held
            prompt = 4 * (num_free + 2)
            engine.request(request_spec(f"r{num_requests}", num_prompt_tokens=prompt, max_new_tokens=4))
            while engine.requests[f"r{num_requests}"].finish_reason is None:
                engine.step()
        engine.step()
        engine.scheduler.check_invariants()
    assert record.num_drops == 3 == engine.scheduler.num_packs_dropped
    engine.run()
    engine.check_finished()
    assert engine.steps_done["j"] == 1


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_growing_decodes_have_the_wave_finish_its_layer_and_take_its_blocks(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any], max_inflight: int
) -> None:
    engine = make_engine(
        targets=LatencyTargets(tpot_s=0.01135, ttft_s=2.0),  # leaves about two slices beside a decode
        noise=0.0,
        block_size=16,
        num_blocks=9,
        max_model_len=256,
        inference_reserve_blocks=1,
        num_layers=40,
        max_inflight=max_inflight,
    )
    engine.add_job("j", 64)
    for name, num_prompt_tokens in (("r", 3), ("s", 11)):
        engine.request(request_spec(name, num_prompt_tokens=num_prompt_tokens, max_new_tokens=60))
    while not any(s.kind is SegmentKind.DECODE for s in engine.step().forward):
        pass
    engine.add_step("j", "t", [60])
    pauses = [0]
    while engine.requests["r"].finish_reason is None:
        plan = engine.step()
        pauses.append(0 if any(s.sequence_id == "r" for s in plan.forward) else pauses[-1] + 1)
        engine.scheduler.check_invariants()
    assert 1 <= max(pauses) <= 2 * max_inflight
    assert engine.packs["j/0/0"].num_drops >= 1
    assert engine.scheduler.num_preemptions == 0
    engine.run()
    assert engine.steps_done["j"] == 1


def test_a_pack_that_has_waited_too_long_gets_blocks_and_keeps_them(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(num_blocks=24, inference_reserve_blocks=4, max_training_wait_s=1.0)
    engine.add_job("j", 64)
    num_requests = 0
    while engine.steps_done["j"] == 0:
        while engine.scheduler.num_waiting < 6:
            num_requests += 1
            engine.request(request_spec(f"r{num_requests}", num_prompt_tokens=20, max_new_tokens=8))
        engine.step()
        if len(engine.plans) == 20:
            engine.add_step("j", "t", [60])
            added_s = engine.now
        assert len(engine.plans) < 1500
    assert engine.now - added_s > 1.0
    assert num_requests > 20
    engine.run()
    engine.check_finished()


def test_decodes_that_grow_preempt_the_youngest_rather_than_drop_a_pack_that_has_waited_too_long(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    slack = LatencyTargets(tpot_s=0.01135, ttft_s=2.0)
    engine = make_engine(
        targets=slack,
        noise=0.0,
        num_blocks=32,
        inference_reserve_blocks=2,
        num_layers=60,
        max_training_wait_s=0.0,
    )
    engine.add_job("j", 64)
    for name in ("old", "young"):
        engine.request(request_spec(name, num_prompt_tokens=2, max_new_tokens=60))
    while not any(s.kind is SegmentKind.DECODE for s in engine.step().forward):
        pass
    engine.add_step("j", "t", [60])
    while engine.requests["old"].finish_reason is None:
        engine.step()
    assert engine.packs["j/0/0"].num_drops == 0
    assert {name for plan in engine.plans for name in plan.memory.preempted} == {"young"}
    engine.run()
    engine.check_finished()


def test_blocks_of_a_removed_job_wait_for_the_plan_in_flight(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(num_blocks=20, max_inflight=2, num_layers=2, targets=LatencyTargets(1e-6, 1e-6))
    engine.add_job("j", 64)
    while engine.scheduler.adapter_slot("job:j") is None:
        engine.step()
    engine.add_step("j", "t", [40])
    engine.make_plan()
    engine.remove_job("j")
    engine.request(request_spec("r", num_prompt_tokens=60, max_new_tokens=1))
    assert engine.make_plan().is_empty
    engine.commit()
    assert [s.sequence_id for s in engine.make_plan().forward] == ["r"]
    engine.run()


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_a_job_can_be_removed_at_any_moment(make_engine: Callable[..., Any], max_inflight: int) -> None:
    for num_steps in range(30):
        engine = make_engine(targets=TIGHT, num_layers=4, max_inflight=max_inflight)
        for job in ("a", "b"):
            engine.add_job(job, 64)
            engine.add_step(job, job, [24, 10])
        for _ in range(num_steps):
            engine.step()
        engine.remove_job("a")
        engine.scheduler.check_invariants()
        engine.run()
        assert engine.steps_done == {"b": 1}
        engine.step()
        assert set(engine.slots.values()) == {"job:b"}
        assert not engine.scheduler.remove_job("a")


def test_a_removed_job_can_start_again_with_a_fresh_adapter(make_engine: Callable[..., Any]) -> None:
    engine = make_engine(latency=lambda: 0.05, max_inflight=2)
    for _ in range(3):
        engine.add_job("j", 64)
        engine.add_step("j", "t", [8])
        for _ in range(3):
            engine.step()
        engine.remove_job("j")
        engine.pending = [item for item in engine.pending if item[1] == "load"]
    engine.add_job("j", 64)
    engine.add_step("j", "t", [8])
    engine.run()
    assert engine.steps_done["j"] == 1


def test_jobs_of_tenants_share_packs_by_weight(make_engine: Callable[..., Any]) -> None:
    engine = make_engine(max_train_tokens=16, tenant_weights={"gold": 3.0})
    for tenant in ("gold", "iron"):
        engine.add_job(tenant, 64)
        engine.add_step(tenant, tenant, [16] * 80)
    for _ in range(30):
        engine.step()
    done = {t: sum(r.is_done for r in engine.packs.values() if r.spec.tenant == t) for t in ("gold", "iron")}
    assert done["iron"] >= 3
    assert done["gold"] / done["iron"] == pytest.approx(3.0, rel=0.25)


def test_weights_hold_for_jobs_that_have_one_pack_at_a_time(make_engine: Callable[..., Any]) -> None:
    engine = make_engine(max_train_tokens=16, num_adapter_slots=8, tenant_weights={"gold": 3.0})
    jobs = {"gold1": "gold", "gold2": "gold", "iron1": "iron", "iron2": "iron"}
    for job in jobs:
        engine.add_job(job, 64)
    for _ in range(400):
        for job, tenant in jobs.items():
            if engine.scheduler.adapter_slot(f"job:{job}") is not None and not engine.job_has_work(job):
                engine.add_step(job, tenant, [16])
        engine.step()
    done = {t: sum(engine.steps_done[job] for job in jobs if jobs[job] == t) for t in ("gold", "iron")}
    assert done["gold"] / done["iron"] == pytest.approx(3.0, rel=0.25)


def test_a_failed_training_adapter_is_not_asked_for_again(make_limits: Callable[..., Any]) -> None:
    scheduler = Scheduler(make_limits(), CostModel(), LatencyTargets(0.05, 2.0))
    scheduler.add_training_adapter("job:j", 64)
    assert scheduler.plan(0.0).memory.adapter_fetches == ("job:j",)
    assert scheduler.adapter_failed("job:j") == []
    assert scheduler.plan(0.0).memory.adapter_fetches == ()
    assert scheduler.remove_job("j")


def test_a_large_training_adapter_is_not_overtaken_by_later_small_ones(
    make_engine: Callable[..., Any],
) -> None:
    engine = make_engine(arena_elements=8 * 64, num_adapter_slots=6)
    engine.add_job("first", 2 * 64)
    for _ in range(3):
        engine.step()
    engine.add_job("large", 4 * 64)
    engine.add_job("small", 64)
    for _ in range(5):
        engine.step()
    assert set(engine.slots.values()) == {"job:first"}
    engine.remove_job("first")
    for _ in range(5):
        engine.step()
    assert set(engine.slots.values()) == {"job:large"}


def test_misuse_of_steps_and_packs_is_refused(make_limits: Callable[..., Any]) -> None:
    scheduler = Scheduler(make_limits(), CostModel(), LatencyTargets(0.05, 2.0))
    pack = PackSpec("p", "j", "t", 8, "job:j", 8)
    with pytest.raises(ValueError, match="add the training adapter job:j"):
        scheduler.add_pack(pack, 0.0)
    with pytest.raises(KeyError):
        scheduler.step_ready("j", 0.0)
    scheduler.add_training_adapter("job:j", 64)
    with pytest.raises(ValueError, match="exists already"):
        scheduler.add_training_adapter("job:j", 64)
    with pytest.raises(RequestTooLarge, match="may pin offers"):
        scheduler.add_training_adapter("job:k", 10**9)
    scheduler.add_pack(pack, 0.0)
    with pytest.raises(ValueError, match="p exists already"):
        scheduler.add_pack(pack, 0.0)
    with pytest.raises(RequestTooLarge, match="97 tokens; 1 to 96 fit"):
        scheduler.add_pack(PackSpec("q", "j", "t", 97, "job:j", 8), 0.0)
    scheduler.step_ready("j", 0.0)
    with pytest.raises(ValueError, match="closed until its StepDone"):
        scheduler.add_pack(PackSpec("q", "j", "t", 8, "job:j", 8), 0.0)


def test_a_step_without_packs_is_an_optimizer_step_alone(make_engine: Callable[..., Any]) -> None:
    engine = make_engine()
    engine.add_job("j", 64)
    engine.add_step("j", "t", [])
    engine.run()
    assert engine.steps_done["j"] == 1


def test_an_empty_plan_needs_no_commit(make_limits: Callable[..., Any]) -> None:
    scheduler = Scheduler(make_limits(), CostModel(), LatencyTargets(0.05, 2.0))
    plan = scheduler.plan(0.0)
    assert plan.is_empty
    assert scheduler.commit(plan, StepResult(), 0.0) == []
    assert not scheduler.has_work()


def test_a_window_that_does_not_fit_the_budget_is_cut(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    # A decode takes 10 ms: beside it the budget has room for a part of a window of 256.
    engine = make_engine(
        targets=LatencyTargets(tpot_s=0.013, ttft_s=2.0),
        noise=0.0,
        num_blocks=2000,
        window_tokens=256,
        max_batch_tokens=512,
        max_train_tokens=2048,
        max_model_len=1000,
    )
    engine.request(request_spec("r", num_prompt_tokens=4, max_new_tokens=900))
    engine.train_endlessly("j", "t", [1024])
    sizes = set()
    for _ in range(200):
        plan = engine.step()
        sizes |= {s.num_tokens for s in plan.forward if s.kind is SegmentKind.TRAIN}
    assert any(16 <= size < 256 for size in sizes), sizes
    assert engine.steps_done["j"] > 0
