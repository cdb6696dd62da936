"""Far more adapters than the arena holds: nobody waits longer than the bound, loads serve many, and a plan
looks at few.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft_scheduler import CostModel, LatencyTargets, Scheduler
from weft_scheduler.reservations import MAX_RESERVED_SHARE

MAX_WAIT_S = 0.5
ROOMY = {"num_blocks": 4096, "block_size": 8, "max_num_seqs": 64, "max_batch_tokens": 512}


def arena_for(num_adapters: int) -> dict[str, Any]:
    return {
        "num_adapter_slots": num_adapters,
        "arena_elements": num_adapters * 64,
        "training_adapter_share": 0.0,
    }


def power_law(num_adapters: int) -> list[float]:
    return list(accumulate((rank + 0.6) ** -0.94 for rank in range(1, num_adapters + 1)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    num_slots=st.integers(1, 12),
    num_adapters=st.integers(2, 40),
    latency_s=st.sampled_from([0.0, 0.05]),
    max_inflight=st.integers(1, 2),
)
def test_every_waiter_is_admitted_within_max_wait_and_a_drain_for_every_round_of_reservations(
    make_engine: Callable[..., Any],
    request_spec: Callable[..., Any],
    seed: int,
    num_slots: int,
    num_adapters: int,
    latency_s: float,
    max_inflight: int,
) -> None:
    """Of `num_adapters` wanted ones, `k` at a time get places as fast as the longest sequences end."""
    rng = random.Random(seed)
    engine = make_engine(
        seed,
        **ROOMY,
        **arena_for(num_slots),
        max_wait_s=MAX_WAIT_S,
        max_inflight=max_inflight,
        latency=lambda: latency_s,
    )
    weights, longest = power_law(num_adapters), 40
    for idx in range(300):
        adapter = rng.choices(range(num_adapters), cum_weights=weights)[0]
        spec = request_spec(
            f"r{idx}",
            tenant=f"t{adapter % 3}",
            adapter=f"a{adapter}",
            max_new_tokens=rng.randint(1, longest),
            adapter_elements=64,
        )
        engine.request(spec)
        if engine.scheduler.num_waiting > 20 or rng.random() < 0.5:
            engine.step()
    engine.run()
    engine.check_finished()
    iteration_s = max(plan.predicted_s for plan in engine.plans) * 1.1
    drain_s = (longest + 2 * max_inflight) * iteration_s + 2 * latency_s
    rounds = -(-num_adapters // max(1, int(MAX_RESERVED_SHARE * num_slots))) + 1
    waits = [request.first_token_s - request.arrival_s for request in engine.requests.values()]
    assert max(waits) <= MAX_WAIT_S + rounds * drain_s


def test_an_adapter_that_many_wait_for_is_loaded_before_those_that_one_waits_for(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(**ROOMY, **arena_for(2), latency=lambda: 0.01)
    for idx in range(6):
        engine.request(request_spec(f"single{idx}", adapter=f"single{idx}"))
    for idx in range(5):
        engine.request(request_spec(f"popular{idx}", adapter="popular"))
    engine.run()
    loads = [load.adapter for plan in engine.plans for load in plan.memory.adapter_loads]
    assert loads[0] == "popular"
    assert sorted(loads) == sorted({"popular", *(f"single{idx}" for idx in range(6))})


def test_a_rare_adapter_is_served_in_time_though_others_have_more_waiters_all_the_time(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(**ROOMY, **arena_for(2), max_wait_s=0.3)
    engine.request(request_spec("rare", adapter="rare"))
    for turn in range(200):
        for adapter in range(6):
            if engine.scheduler.num_waiting < 30:
                engine.request(request_spec(f"p{turn}-{adapter}", adapter=f"popular{adapter}"))
        engine.step()
    rare = engine.requests["rare"]
    assert rare.first_token_s is not None
    assert rare.first_token_s < 0.3 + 0.3
    engine.run()


def test_300_active_of_10000_adapters_are_served_through_room_for_32(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(**ROOMY, **arena_for(32), latency=lambda: 0.005)
    rng = random.Random(3)
    active, weights = rng.sample(range(10_000), 300), power_law(300)
    for idx in range(1500):
        adapter = active[rng.choices(range(300), cum_weights=weights)[0]]
        engine.request(request_spec(f"r{idx}", tenant=f"t{adapter % 10}", adapter=f"a{adapter}"))
        if idx % 3 == 0:
            engine.step()
    engine.run()
    engine.check_finished()
    num_loads = sum(len(plan.memory.adapter_loads) for plan in engine.plans)
    num_wanted = len({request.spec.adapter for request in engine.requests.values()})
    assert num_wanted <= num_loads < 1500 / 2
    staged: set[str] = set()
    for plan in engine.plans:
        staged |= set(plan.memory.adapter_fetches)
        staged -= {load.adapter for load in plan.memory.adapter_loads}
        assert len(staged) <= 33, "more is fetched than the arena holds"


def test_an_adapter_is_fetched_when_its_request_arrives_though_the_arena_is_full(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(**ROOMY, **arena_for(2), latency=lambda: 0.001)
    for adapter in ("a", "b"):
        engine.request(request_spec(adapter, adapter=adapter, max_new_tokens=60))
    while engine.scheduler.num_running < 2:
        engine.step()
    engine.request(request_spec("late", adapter="late"))
    assert engine.step().memory.adapter_fetches == ("late",)
    engine.run()
    engine.check_finished()


def calls_of_a_plan(scheduler: Scheduler) -> int:
    """Python functions entered by one plan: work that does not depend on the machine."""
    count = 0

    def watch(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event == "call"

    former = sys.getprofile()
    sys.setprofile(watch)
    try:
        scheduler.plan(1.0)
    finally:
        sys.setprofile(former)
    return count


@pytest.mark.parametrize("num_waiting", [200, 4000])
def test_a_plan_looks_at_few_adapters_however_many_are_waited_for(
    make_limits: Callable[..., Any], request_spec: Callable[..., Any], num_waiting: int
) -> None:
    """The arena and host memory are full; every waiter wants another adapter."""
    limits = make_limits(**ROOMY, **arena_for(16), max_inflight=8)
    scheduler = Scheduler(limits, CostModel(), LatencyTargets(0.05, 2.0))
    for idx in range(num_waiting):
        scheduler.add_request(request_spec(f"r{idx}", adapter=f"a{idx}", num_prompt_tokens=1), 0.0)
    for _ in range(6):
        plan = scheduler.plan(0.0)
        for key in plan.memory.adapter_fetches:
            scheduler.adapter_fetched(key, 64)
        for load in plan.memory.adapter_loads:
            scheduler.adapter_loaded(load.adapter)
    assert scheduler.num_running == 16
    assert calls_of_a_plan(scheduler) < 1000


def waits_by_tenant(
    make_engine: Callable[..., Any],
    request_spec: Callable[..., Any],
    tenant_of: Callable[[int], str],
    num_requests: int = 2000,
) -> dict[str, list[float]]:
    """Seconds to the first token, in order, where more is asked for than can be served: 200 requests a
    second, of 40 tokens, for 300 adapters through room for 32."""
    engine = make_engine(3, **ROOMY, **arena_for(32), latency=lambda: 0.005)
    rng, weights, due_s = random.Random(3), power_law(300), 0.0
    for idx in range(num_requests):
        due_s += rng.expovariate(200.0)
        while engine.now < due_s and engine.scheduler.has_work():
            engine.step()
        engine.now = max(engine.now, due_s)
        adapter = rng.choices(range(300), cum_weights=weights)[0]
        name = f"a{adapter}"
        engine.request(request_spec(f"r{idx}", tenant=tenant_of(adapter), adapter=name, max_new_tokens=40))
    engine.run()
    waits: dict[str, list[float]] = {}
    for request in engine.requests.values():
        waits.setdefault(request.spec.tenant, []).append(request.first_token_s - request.arrival_s)
    return {tenant: sorted(own) for tenant, own in waits.items()}


def p99(waits: list[float]) -> float:
    return sorted(waits)[int(0.99 * len(waits))]


def test_beyond_capacity_those_who_ask_for_more_than_their_share_wait_and_not_the_others(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    """Against one queue for all. Adapters are asked for by a power law, so tenant 0 asks for most by far."""
    (together,) = waits_by_tenant(make_engine, request_spec, lambda _adapter: "all").values()
    apart = waits_by_tenant(make_engine, request_spec, lambda adapter: f"t{adapter % 10}")
    most, *others = sorted(apart.values(), key=len, reverse=True)
    assert len(most) > 1.5 * 2000 / 10, "it asks for half as much again as its share"
    assert p99(most) > p99(together)
    for waits in others[len(others) // 2 :]:
        assert p99(waits) < p99(together)
    for waits in others:
        assert p99(waits) < 1.2 * p99(together)
