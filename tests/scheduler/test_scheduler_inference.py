"""Requests through the scheduler: prompts in chunks, decodes in every plan, ends, aborts, memory pressure,
fairness.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from weft_scheduler import (
    CostModel,
    LatencyTargets,
    Scheduler,
    SegmentKind,
    SequenceToken,
    StepResult,
)
from weft_scheduler.requests import RequestTooLarge

TIGHT = LatencyTargets(tpot_s=0.0115, ttft_s=2.0)


def segments_of(engine: Any, sequence_id: str) -> list[Any]:
    return [s for plan in engine.plans for s in plan.forward if s.sequence_id == sequence_id]


def test_a_prompt_is_computed_in_chunks_and_the_chunk_that_ends_it_samples(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_model_len=256, max_batch_tokens=64)
    engine.request(request_spec("r", num_prompt_tokens=150, max_new_tokens=3))
    engine.run()
    chunks = [(s.kind, s.start, s.num_tokens, s.samples) for s in segments_of(engine, "r")]
    prefill, decode = SegmentKind.PREFILL, SegmentKind.DECODE
    assert chunks == [
        (prefill, 0, 64, False),
        (prefill, 64, 64, False),
        (prefill, 128, 22, True),
        (decode, 150, 1, True),
        (decode, 151, 1, True),
    ]
    engine.check_finished()


def test_running_sequences_decode_in_every_plan_while_prompts_come_in(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(targets=TIGHT, max_model_len=256)
    engine.request(request_spec("first", max_new_tokens=40))
    engine.step()
    for idx in range(3):
        engine.request(request_spec(f"long{idx}", num_prompt_tokens=60))
    engine.run()
    with_first = [[s.sequence_id for s in plan.forward] for plan in engine.plans if not plan.is_empty]
    assert all("first" in names for names in with_first[:40])
    engine.check_finished()


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_a_stop_token_ends_a_sequence_once_the_least_number_of_tokens_is_reached(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any], max_inflight: int
) -> None:
    engine = make_engine(max_inflight=max_inflight)
    engine.request(request_spec("early", max_new_tokens=9), stop_after=4)
    engine.request(request_spec("late", max_new_tokens=9, min_new_tokens=6), stop_after=2)
    engine.request(request_spec("never", max_new_tokens=9))
    engine.run()
    lengths = {name: (len(r.tokens), r.finish_reason) for name, r in engine.requests.items()}
    assert lengths == {"early": (4, "stop"), "late": (6, "stop"), "never": (9, "length")}


def test_a_token_computed_beyond_the_end_is_not_reported(
    make_limits: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    scheduler = Scheduler(make_limits(max_inflight=2), CostModel(), LatencyTargets(0.05, 2.0))
    scheduler.add_request(request_spec("r"), 0.0)
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    assert [s.kind for s in second.forward] == [SegmentKind.DECODE]
    with pytest.raises(RuntimeError, match="2 plans are in flight"):
        scheduler.plan(0.0)
    assert scheduler.commit(first, StepResult({"r": 7}, 0.01), 0.0) == [SequenceToken("r", 7, "stop")]
    assert scheduler.num_blocks_held == 0
    assert scheduler.commit(second, StepResult({"r": 3}, 0.01), 0.0) == []
    assert not scheduler.has_work()


def test_generation_ends_at_the_models_length(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_model_len=20)
    engine.request(request_spec("r", num_prompt_tokens=15, max_new_tokens=1000))
    engine.run()
    assert len(engine.requests["r"].tokens) == 5
    assert engine.requests["r"].finish_reason == "length"


def test_a_prompt_that_fills_the_context_samples_the_one_token_that_needs_no_room(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_model_len=20)
    engine.request(request_spec("r", num_prompt_tokens=20, max_new_tokens=3))
    engine.run()
    assert len(engine.requests["r"].tokens) == 1
    assert engine.requests["r"].finish_reason == "length"


def test_plans_are_committed_in_order_and_completely(
    make_limits: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    scheduler = Scheduler(make_limits(max_inflight=2), CostModel(), LatencyTargets(0.05, 2.0))
    scheduler.add_request(request_spec("r"), 0.0)
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    with pytest.raises(ValueError, match="iteration 2 is not the oldest"):
        scheduler.commit(second, StepResult({"r": 1}, 0.01), 0.0)
    with pytest.raises(ValueError, match="no token for sequence r"):
        scheduler.commit(first, StepResult({}, 0.01), 0.0)
    assert scheduler.commit(first, StepResult({"r": 1}, 0.01), 0.0)
    with pytest.raises(ValueError, match="iteration 1 is not the oldest"):
        scheduler.commit(first, StepResult({"r": 1}, 0.01), 0.0)


def test_blocks_of_an_aborted_request_wait_for_the_plan_in_flight(
    make_limits: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    limits = make_limits(num_blocks=4, inference_reserve_blocks=0, max_inflight=2)
    scheduler = Scheduler(limits, CostModel(), LatencyTargets(0.05, 2.0))
    scheduler.add_request(request_spec("old", num_prompt_tokens=16, max_new_tokens=1), 0.0)
    running = scheduler.plan(0.0)
    assert scheduler.abort("old")
    assert not scheduler.abort("old")
    scheduler.add_request(request_spec("old", num_prompt_tokens=16, max_new_tokens=1), 0.0)
    assert scheduler.plan(0.0).is_empty
    assert scheduler.commit(running, StepResult({"old": 1}, 0.01), 0.0) == []
    again = scheduler.plan(0.0)
    assert [s.sequence_id for s in again.forward] == ["old"]
    assert scheduler.commit(again, StepResult({"old": 1}, 0.01), 0.0) == [SequenceToken("old", 1, "length")]


def test_requests_that_can_never_run_are_refused_with_value_and_limit(
    make_limits: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    limits = make_limits(num_blocks=16, block_size=4, max_model_len=128)
    scheduler = Scheduler(limits, CostModel(), LatencyTargets(0.05, 2.0))
    with pytest.raises(RequestTooLarge, match="129 tokens; the context holds 128"):
        scheduler.add_request(request_spec("r", num_prompt_tokens=129), 0.0)
    with pytest.raises(RequestTooLarge, match="need 65 tokens of cache; there are 64"):
        scheduler.add_request(request_spec("r", num_prompt_tokens=60, max_new_tokens=6), 0.0)
    with pytest.raises(RequestTooLarge, match="elements"):
        scheduler.add_request(request_spec("r", adapter="a", adapter_elements=10**9), 0.0)
    with pytest.raises(ValueError, match="at least 1"):
        scheduler.add_request(request_spec("r", max_new_tokens=0), 0.0)
    assert not scheduler.has_work()
    scheduler.add_request(request_spec("r", num_prompt_tokens=60, max_new_tokens=5), 0.0)
    with pytest.raises(ValueError, match="exists already"):
        scheduler.add_request(request_spec("r"), 0.0)


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_the_youngest_of_the_lowest_priority_is_preempted_and_finishes_later(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any], max_inflight: int
) -> None:
    engine = make_engine(num_blocks=12, inference_reserve_blocks=0, max_inflight=max_inflight)
    engine.request(request_spec("low", num_prompt_tokens=4, max_new_tokens=30, priority=1))
    engine.request(request_spec("old", num_prompt_tokens=4, max_new_tokens=30))
    engine.request(request_spec("young", num_prompt_tokens=4, max_new_tokens=30))
    engine.run()
    victims = [name for plan in engine.plans for name in plan.memory.preempted]
    assert victims[0] == "low"
    assert "old" not in victims
    assert engine.scheduler.num_preemptions == len(victims)
    engine.check_finished()


def test_requests_that_fill_the_cache_by_turns_all_finish(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(num_blocks=5, block_size=1, inference_reserve_blocks=0, max_inflight=2)
    for idx in range(12):
        engine.request(request_spec(f"r{idx}", num_prompt_tokens=1 + idx % 3, max_new_tokens=3))
    engine.run()
    engine.check_finished()


def test_a_large_request_is_not_overtaken_for_ever_by_small_ones(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(num_blocks=20, inference_reserve_blocks=0)
    engine.request(request_spec("r0", num_prompt_tokens=20, max_new_tokens=4))
    engine.request(request_spec("large", num_prompt_tokens=70, max_new_tokens=4))
    for idx in range(60):
        engine.request(request_spec(f"s{idx}", tenant="small", num_prompt_tokens=4, max_new_tokens=3))
        engine.step()
    assert engine.requests["large"].finish_reason == "length"


def test_a_flood_of_one_tenant_does_not_starve_another(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_num_seqs=4)
    for idx in range(300):
        engine.request(request_spec(f"flood{idx}", tenant="flood", max_new_tokens=8))
    waits = []
    for idx in range(30):
        for _ in range(10):
            engine.step()
        engine.request(request_spec(f"calm{idx}", tenant="calm", max_new_tokens=8))
        arrived = len(engine.plans)
        while engine.requests[f"calm{idx}"].first_token_s is None:
            engine.step()
        waits.append(len(engine.plans) - arrived)
    assert any(r.finish_reason is None for name, r in engine.requests.items() if name.startswith("flood"))
    assert max(waits) <= 10  # until one of the four running requests has made its eight tokens


@pytest.mark.parametrize("max_new_tokens", [1, 4])
def test_backlogged_tenants_are_served_by_weight(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any], max_new_tokens: int
) -> None:
    engine = make_engine(max_num_seqs=2, tenant_weights={"gold": 3.0})
    for idx in range(200):
        for tenant in ("gold", "iron"):
            engine.request(request_spec(f"{tenant}{idx}", tenant=tenant, max_new_tokens=max_new_tokens))
    for _ in range(100 * max_new_tokens):
        engine.step()
    done = {
        t: sum(len(r.tokens) for n, r in engine.requests.items() if n.startswith(t)) for t in ("gold", "iron")
    }
    assert done["gold"] / done["iron"] == pytest.approx(3.0, rel=0.1)


def test_within_a_tenant_lower_priority_numbers_go_first(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_num_seqs=1)
    for name, priority in (("a", 5), ("b", 0), ("c", 0), ("d", -1)):
        engine.request(request_spec(name, priority=priority))
    engine.run()
    first = sorted(engine.requests, key=lambda name: engine.requests[name].first_token_s)
    assert first == ["d", "b", "c", "a"]


def test_prompt_chunks_stay_within_the_budget_while_others_decode(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(targets=TIGHT, max_model_len=4096, num_blocks=2048, max_batch_tokens=1024)
    engine.request(request_spec("decoding", max_new_tokens=500))
    engine.step()
    engine.request(request_spec("long", num_prompt_tokens=3000, max_new_tokens=1))
    while engine.requests["long"].finish_reason is None:
        engine.step()
    chunks = [s.num_tokens for s in segments_of(engine, "long")]
    assert max(chunks[:-1]) < 1024
    assert min(chunks[:-1]) >= 64


def test_without_decodes_prompts_may_fill_the_open_budget_and_finetuning_only_the_tight_one(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(targets=LatencyTargets(0.0115, 2.0), num_layers=300, noise=0.0)
    engine.add_job("j", 64)
    while engine.scheduler.adapter_slot("job:j") is None:
        engine.step()
    engine.add_step("j", "t", [40])
    for idx in range(20):
        engine.request(request_spec(f"r{idx}", num_prompt_tokens=30, max_new_tokens=1))
        plan = engine.step()
        assert plan.budget_s == 0.5
        assert any(s.kind is SegmentKind.PREFILL for s in plan.forward)
        assert len(plan.backward) <= 20
    engine.run()
    assert max(len(plan.backward) for plan in engine.plans) > 100


def test_limits_with_which_work_could_never_run_are_refused(make_limits: Callable[..., Any]) -> None:
    for field, value in (
        ("num_blocks", 0),
        ("max_batch_tokens", 8),
        ("max_batch_tokens", 15),
        ("inference_reserve_blocks", 64),
        ("training_adapter_share", 1.5),
        ("max_wait_s", -1.0),
    ):
        with pytest.raises(ValueError, match=f"{field} is {value}"):
            make_limits(**{field: value})
