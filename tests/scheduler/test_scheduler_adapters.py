"""Adapters through the scheduler: loads delay only who waits for them, rare ones are not starved, failures
stay alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weft_scheduler import CostModel, LatencyTargets, Scheduler, SegmentKind, StepResult

SLOT = {"num_adapter_slots": 8, "arena_elements": 8 * 64, "training_adapter_share": 0.0}


def test_200_adapters_are_served_through_an_arena_of_8(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(**SLOT, num_blocks=512, latency=lambda: 0.02)
    for idx in range(600):
        adapter = f"a{(idx * 37) % 200}"
        engine.request(request_spec(f"r{idx}", tenant=f"t{idx % 5}", adapter=adapter))
    engine.run()
    engine.check_finished()
    assert len({load.adapter for plan in engine.plans for load in plan.memory.adapter_loads}) == 200
    assert max(plan_slots(engine)) <= 8


def plan_slots(engine: Any) -> list[int]:
    return [len({s.adapter_slot for s in plan.forward}) for plan in engine.plans]


def test_rare_adapters_are_served_though_the_arena_is_full_of_popular_ones(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(**SLOT, num_blocks=512, max_num_seqs=16, max_wait_s=1.0, max_batch_tokens=128)
    num_popular = 0
    for rare in range(40):
        engine.request(request_spec(f"rare{rare}", tenant="rare", adapter=f"rare{rare}"))
        for _ in range(6):
            waiting = engine.scheduler.num_waiting
            for idx in range(max(0, 20 - waiting)):
                num_popular += 1
                name = f"pop{num_popular}"
                engine.request(request_spec(name, tenant=f"t{idx % 4}", adapter=f"pop{num_popular % 8}"))
            engine.step()
    engine.run()
    engine.check_finished()
    waits = [r.first_token_s - r.arrival_s for n, r in engine.requests.items() if n.startswith("rare")]
    assert max(waits) < 4.0  # overdue after 1 s, then one sequence's length for each earlier reservation


def test_an_adapter_that_fills_the_arena_gets_its_turn(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(**SLOT, max_wait_s=0.5)
    engine.request(request_spec("big", adapter="big", adapter_elements=8 * 64))
    engine.requests["big"].arrival_s = 0.0
    for idx in range(400):
        engine.request(request_spec(f"r{idx}", tenant=f"t{idx % 3}", adapter=f"a{idx % 8}"))
        engine.step()
        if engine.requests["big"].finish_reason:
            break
    assert engine.requests["big"].finish_reason == "length"
    engine.run()
    engine.check_finished()


def test_decodes_never_pause_for_a_load(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(**SLOT, latency=lambda: 0.1, num_blocks=256)
    engine.request(request_spec("base", max_new_tokens=80))
    engine.step()
    for idx in range(20):
        engine.request(request_spec(f"r{idx}", adapter=f"a{idx}"))
    while engine.requests["base"].finish_reason is None:
        plan = engine.step()
        assert plan.is_empty or any(s.sequence_id == "base" for s in plan.forward)
    engine.run()
    engine.check_finished()


def test_a_request_on_a_resident_adapter_overtakes_one_whose_adapter_is_being_fetched(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(**SLOT, latency=lambda: 1.0)
    engine.request(request_spec("cold", adapter="a"))
    engine.request(request_spec("base"))
    assert [s.sequence_id for s in engine.step().forward] == ["base"]
    engine.run()
    engine.check_finished()


def test_the_requests_of_an_adapter_that_cannot_be_fetched_fail_and_a_later_one_tries_again(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(**SLOT)
    engine.failing = {"bad"}
    for name, adapter in (("r1", "bad"), ("r2", "bad"), ("r3", "good"), ("r4", None)):
        engine.request(request_spec(name, adapter=adapter))
    engine.run()
    assert engine.aborted == {"r1", "r2"}
    engine.failing = set()
    engine.request(request_spec("r5", adapter="bad"))
    engine.run()
    assert set(engine.requests) == {"r3", "r4", "r5"}
    engine.check_finished()


def test_an_adapter_found_too_large_when_fetched_fails_its_requests(
    make_limits: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    scheduler = Scheduler(make_limits(**SLOT), CostModel(), LatencyTargets(0.05, 2.0))
    scheduler.add_request(request_spec("r", adapter="a"), 0.0)
    assert scheduler.plan(0.0).memory.adapter_fetches == ("a",)
    assert scheduler.plan(0.0).memory.adapter_fetches == ()
    refusal = scheduler.adapter_fetched("a", 10_000)
    assert refusal is not None
    assert "10000 elements" in refusal
    assert scheduler.adapter_failed("a") == ["r"]
    assert not scheduler.has_work()


def test_aborting_the_only_waiter_stops_the_way_of_its_adapter(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(**SLOT, latency=lambda: 0.5)
    engine.request(request_spec("r", adapter="a"))
    engine.step()
    engine.abort("r")
    for _ in range(5):
        engine.step()
    assert not [load for plan in engine.plans for load in plan.memory.adapter_loads]
    assert not engine.scheduler.has_work()


def test_a_flood_of_adapters_of_one_tenant_does_not_starve_another(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(**SLOT, num_blocks=512, max_wait_s=60.0, latency=lambda: 0.02)
    for idx in range(400):
        engine.request(request_spec(f"flood{idx}", tenant="flood", adapter=f"flood{idx}"))
    for _ in range(30):
        engine.step()
    engine.request(request_spec("calm", tenant="calm", adapter="calm"))
    while engine.requests["calm"].finish_reason is None:
        engine.step()
    served = sum(r.finish_reason is not None for r in engine.requests.values())
    assert served < 100
    engine.run()


def test_a_large_adapter_is_fetched_in_its_turn_though_small_ones_keep_coming(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(**SLOT, num_blocks=512, max_wait_s=60.0, latency=lambda: 0.02)
    engine.request(request_spec("first", adapter="first", adapter_elements=6 * 64))
    engine.request(request_spec("large", adapter="large", adapter_elements=7 * 64))
    for idx in range(300):
        engine.request(request_spec(f"r{idx}", adapter=f"a{idx}", adapter_elements=64))
        if "large" in engine.step().memory.adapter_fetches:
            break
    assert idx < 40


def test_decode_kind_and_slot_stay_with_a_sequence_through_its_life(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(**SLOT)
    engine.request(request_spec("r", adapter="a", num_prompt_tokens=1))
    engine.run()
    kinds = [s.kind for plan in engine.plans for s in plan.forward]
    assert kinds == [SegmentKind.PREFILL] + [SegmentKind.DECODE] * 4
    assert engine.scheduler.num_adapters_on_device == 1
    assert engine.scheduler.adapter_slot("a") == 0
    assert engine.scheduler.arena_usage == 1 / 8


def test_loads_that_end_between_plans_are_used_by_the_next_plan(
    make_limits: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    scheduler = Scheduler(make_limits(**SLOT), CostModel(), LatencyTargets(0.05, 2.0))
    scheduler.add_request(request_spec("r", adapter="a", max_new_tokens=1), 0.0)
    assert scheduler.plan(0.0).memory.adapter_fetches == ("a",)
    assert scheduler.adapter_fetched("a", 64) is None
    (load,) = scheduler.plan(0.0).memory.adapter_loads
    assert (load.adapter, load.slot, load.offset, load.num_elements) == ("a", 0, 0, 64)
    assert scheduler.plan(0.0).is_empty
    scheduler.adapter_loaded("a")
    plan = scheduler.plan(0.0)
    assert plan.forward[0].adapter_slot == 0
    assert scheduler.commit(plan, StepResult({"r": 1}, 0.01), 0.0)
