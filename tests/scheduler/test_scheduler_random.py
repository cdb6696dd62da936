"""Random work on a simulated engine: whatever happens, everything ends, in order, and nobody reads another's memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft_scheduler import RequestSpec

TENANTS = ("ada", "bob", "cyd")


def random_request(rng: random.Random, idx: int, capacity_tokens: int, num_adapters: int) -> RequestSpec:
    num_prompt_tokens = rng.choice((1, 2, 3, 4, 5, rng.randint(1, capacity_tokens // 2)))
    max_new_tokens = rng.randint(1, max(1, capacity_tokens - num_prompt_tokens))
    adapter = rng.choice([None, *(f"a{i}" for i in range(num_adapters))])
    size = 0 if adapter is None else 64 * (1 + int(adapter[1:]) % 16)
    return RequestSpec(
        sequence_id=f"r{idx}",
        tenant=rng.choice(TENANTS),
        num_prompt_tokens=num_prompt_tokens,
        max_new_tokens=min(max_new_tokens, rng.choice((2, 8, 40))),
        min_new_tokens=rng.choice((0, 0, 3)),
        stop_token_ids=frozenset({7}),
        adapter=adapter,
        adapter_elements=rng.choice((0, size)) if adapter else 0,
        priority=rng.choice((0, 0, 1)),
    )


def drive(engine: Any, rng: random.Random, num_events: int, num_adapters: int) -> None:
    """Mix arrivals, aborts, jobs, failures and iterations, then let everything end."""
    limits = engine.limits
    for adapter_idx in range(num_adapters):
        engine.adapter_elements[f"a{adapter_idx}"] = 64 * (1 + adapter_idx % 16)
    num_requests = num_jobs = 0
    for _ in range(num_events):
        event = rng.random()
        if event < 0.25:
            num_requests += 1
            spec = random_request(rng, num_requests, min(limits.capacity_tokens, limits.max_model_len), num_adapters)
            engine.request(spec, stop_after=rng.choice((None, rng.randint(1, 12))))
        elif event < 0.30 and engine.requests:
            engine.abort(rng.choice(list(engine.requests)))
        elif event < 0.34 and len(engine.open_packs) < 4:
            num_jobs += 1
            engine.add_job(f"j{num_jobs}", 64 * rng.randint(1, 8))
        elif event < 0.40:
            idle = [job for job in engine.open_packs if not engine.job_has_work(job)]
            if idle:
                job = rng.choice(idle)
                sizes = [rng.randint(1, limits.max_pack_tokens) for _ in range(rng.randint(0, 3))]
                engine.add_step(job, rng.choice(TENANTS), sizes)
        elif event < 0.42 and engine.open_packs:
            engine.remove_job(rng.choice(list(engine.open_packs)))
        elif event < 0.44:
            engine.failing ^= {f"a{rng.randrange(num_adapters)}"} if num_adapters else set()
        else:
            engine.step()
        engine.scheduler.check_invariants()
    engine.failing.clear()
    finish(engine)
    engine.check_finished()
    assert all(record.is_done for record in engine.packs.values())
    engine.scheduler.check_invariants()
    assert engine.scheduler.num_blocks_held == 0
    assert not any(key.startswith("job:") for key in engine.slots.values())


def finish(engine: Any) -> None:
    """Run until nothing is left; a job whose step is done ends, so that others get its place on the device."""
    for _ in range(20_000):
        for job in list(engine.open_packs):
            if not engine.job_has_work(job):
                engine.remove_job(job)
        if not engine.scheduler.has_work():
            break
        engine.step()
        engine.scheduler.check_invariants()
    assert not engine.scheduler.has_work()
    engine.step()


@pytest.mark.parametrize("max_inflight", [1, 2])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), shape=st.sampled_from(["roomy", "tiny KV", "tiny arena", "slow loads"]))
def test_random_work_all_ends_and_reads_only_its_own_memory(
    make_engine: Callable[..., Any], max_inflight: int, seed: int, shape: str
) -> None:
    rng = random.Random(seed)
    overrides: dict[str, Any] = {"max_inflight": max_inflight, "max_pack_windows_per_plan": 1}
    if shape == "tiny KV":
        overrides |= {"num_blocks": rng.randint(6, 20), "inference_reserve_blocks": 2, "block_size": 2}
    elif shape == "tiny arena":
        overrides |= {"num_adapter_slots": 2, "arena_elements": 64 * 33, "max_wait_s": 0.1}
    elif shape == "slow loads":
        overrides |= {"latency": lambda: rng.expovariate(20.0), "max_wait_s": 0.2}
    if rng.random() < 0.3:
        overrides["max_training_wait_s"] = 0.05
    engine = make_engine(seed, **overrides)
    drive(engine, rng, rng.randint(10, 150), rng.choice((0, 1, 3, 12)))
