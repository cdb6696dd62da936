"""Random work on a simulated engine: whatever happens, everything ends, in order, and nobody reads another's
memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft_scheduler import LatencyTargets, PrefixSpec, RequestSpec, ServiceTier, prefix_root
from weft_scheduler.policies import AlternatingPolicy, NoCoservingPolicy, Policy, StaticCapPolicy

TENANTS = ("ada", "bob", "cyd")


def random_prompt(engine: Any, rng: random.Random, most: int) -> list[int]:
    """One of a few beginnings, or a conversation so far, and perhaps something of its own."""
    known = [r for r in engine.requests.values() if r.spec.prefix is not None and r.finish_reason]
    if known and rng.random() < 0.4:
        before = rng.choice(known)
        beginning = [*before.spec.prefix.token_ids, *before.tokens]
    else:
        beginning = [rng.randint(20, 21)] * rng.randint(1, most)
    own = [rng.randint(30, 99) for _ in range(rng.choice((0, 1, 5)))]
    return (beginning + own)[:most]


def random_request(engine: Any, rng: random.Random, idx: int, num_adapters: int) -> RequestSpec:
    capacity_tokens = min(engine.limits.capacity_tokens, engine.limits.max_model_len)
    num_prompt_tokens = rng.choice((1, 2, 3, 4, 5, rng.randint(1, capacity_tokens // 2)))
    prompt = random_prompt(engine, rng, capacity_tokens // 2) if rng.random() < 0.7 else None
    if prompt is not None:
        num_prompt_tokens = len(prompt)
    tenant = rng.choice(TENANTS)
    max_new_tokens = rng.randint(1, max(1, capacity_tokens - num_prompt_tokens))
    adapter = rng.choice([None, *(f"a{i}" for i in range(num_adapters))])
    size = 0 if adapter is None else 64 * (1 + int(adapter[1:]) % 16)
    return RequestSpec(
        sequence_id=f"r{idx}",
        tenant=tenant,
        num_prompt_tokens=num_prompt_tokens,
        max_new_tokens=min(max_new_tokens, rng.choice((2, 8, 40))),
        min_new_tokens=rng.choice((0, 0, 3)),
        stop_token_ids=frozenset({7}),
        adapter=adapter,
        adapter_elements=rng.choice((0, size)) if adapter else 0,
        priority=rng.choice((0, 0, 1)),
        prefix=prompt and PrefixSpec(prefix_root(tenant, adapter), prompt, is_read=rng.random() < 0.9),
        tier=rng.choice((ServiceTier.DEFAULT, ServiceTier.DEFAULT, ServiceTier.FLEX)),
        deadline_s=rng.choice((None, None, None, engine.now + rng.expovariate(1.0))),
    )


def drive(engine: Any, rng: random.Random, num_events: int, num_adapters: int) -> None:
    """Mix arrivals, aborts, jobs, failures and iterations, then let everything end."""
    limits = engine.limits
    for adapter_idx in range(num_adapters):
        engine.adapter_elements[f"a{adapter_idx}"] = 64 * (1 + adapter_idx % 16)
    num_requests = num_jobs = 0
    arrivals = rng.choice((0.05, 0.15, 0.25))
    for _ in range(num_events):
        event = rng.random()
        if event < arrivals:
            stop_after = rng.choice((None, rng.randint(1, 12)))
            for _ in range(rng.choice((1, 1, 4))):
                engine.request(random_request(engine, rng, num_requests, num_adapters), stop_after)
                num_requests += 1
        elif 0.25 < event < 0.28 and engine.requests:
            engine.abort(rng.choice(list(engine.requests)))
        elif 0.28 < event < 0.34 and len(engine.open_packs) < 4:
            num_jobs += 1
            engine.add_job(f"j{num_jobs}", 64 * rng.randint(1, 8))
        elif 0.34 < event < 0.45:
            idle = [job for job in engine.open_packs if not engine.job_has_work(job)]
            if idle:
                job = rng.choice(idle)
                sizes = [rng.randint(1, limits.max_pack_tokens) for _ in range(rng.randint(0, 3))]
                engine.add_step(job, rng.choice(TENANTS), sizes)
        elif 0.45 < event < 0.46 and engine.open_packs:
            engine.remove_job(rng.choice(list(engine.open_packs)))
        elif 0.46 < event < 0.48:
            engine.failing ^= {f"a{rng.randrange(num_adapters)}"} if num_adapters else set()
        elif 0.48 < event < 0.49:
            most = {tenant: rng.randint(1, 3) for tenant in TENANTS if rng.random() < 0.5}
            engine.scheduler.set_max_concurrency(most)
        elif 0.49 < event < 0.53 and num_adapters:
            change = rng.choice((engine.scheduler.pin_adapter, engine.scheduler.unpin_adapter))
            change(f"a{rng.randrange(num_adapters)}")
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
    """Run until nothing is left; a job whose step is done ends, so that others get its place."""
    for _ in range(20_000):
        for job in list(engine.open_packs):
            if not engine.job_has_work(job):
                engine.remove_job(job)
        if not engine.scheduler.has_work():
            break
        engine.step()
        engine.scheduler.check_invariants()
    assert not engine.scheduler.has_work()
    while engine.pending:
        engine.step()
    engine.step()


def random_setting(rng: random.Random) -> dict[str, Any]:
    """Sizes and targets; each may be tight on its own."""
    setting: dict[str, Any] = {"max_inflight": rng.choice((1, 2, 3)), "block_size": rng.choice((1, 2, 4))}
    setting["targets"] = LatencyTargets(tpot_s=rng.choice((0.05, 0.0125, 0.0115, 0.009)), ttft_s=2.0)
    if rng.random() < 0.5:
        setting |= {"num_blocks": rng.randint(8, 24), "inference_reserve_blocks": rng.randint(0, 3)}
    if rng.random() < 0.5:
        setting |= {"num_adapter_slots": 2, "arena_elements": 64 * 33, "max_wait_s": 0.1}
    if rng.random() < 0.3:
        setting |= {"latency": lambda: rng.expovariate(20.0), "max_wait_s": 0.2}
    if rng.random() < 0.5:
        setting |= {"training_adapter_share": 0.25, "pinned_adapter_share": 0.25}
    if rng.random() < 0.3:
        setting["max_training_wait_s"] = 0.05
    if rng.random() < 0.5:
        setting["max_flex_wait_s"] = 0.2
    if rng.random() < 0.3:
        setting["nan_rate"] = 0.02
    if rng.random() < 0.5:
        setting["max_kept_tokens"] = rng.randint(0, 64)
    if rng.random() < 0.3:
        setting |= {"max_num_seqs": 3, "max_batch_tokens": 11}
    return setting


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_random_work_all_ends_and_reads_only_its_own_memory(
    make_engine: Callable[..., Any], seed: int
) -> None:
    rng = random.Random(seed)
    engine = make_engine(seed, **random_setting(rng))
    drive(engine, rng, rng.randint(10, 200), rng.choice((0, 1, 3, 12)))
    assert sum(engine.scheduler.service_s.values()) == pytest.approx(engine.charged_s)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_slices_that_an_arrival_cuts_off_run_later_once(make_engine: Callable[..., Any], seed: int) -> None:
    """The engine of the tests checks the order of slices, the blocks under them, and what is done when."""
    rng = random.Random(seed)
    setting = random_setting(rng) | {"max_inflight": 1, "cut_rate": rng.choice((0.1, 0.5, 0.9))}
    engine = make_engine(seed, **setting)
    drive(engine, rng, rng.randint(10, 200), rng.choice((0, 1, 3)))
    assert sum(engine.scheduler.service_s.values()) == pytest.approx(engine.charged_s)


def plans_of(make_engine: Callable[..., Any], seed: int, with_cache: bool) -> list[Any]:
    """What was planned for the same work, without block ids; nobody finds what others have left cached."""
    rng = random.Random(seed)
    engine = make_engine(seed, **(random_setting(rng) | {"noise": 0.0, "nan_rate": 0.0}))
    num_tokens = min(engine.limits.capacity_tokens, engine.limits.max_model_len) // 2
    for idx in range(rng.randint(2, 40)):
        prompt = [rng.randint(0, 1)] * rng.randint(1, num_tokens)
        prefix = PrefixSpec(prefix_root("ada", None), prompt, is_read=False)
        max_new_tokens = rng.randint(1, num_tokens)
        spec = RequestSpec(
            f"r{idx}", "ada", len(prompt), max_new_tokens, prefix=prefix if with_cache else None
        )
        engine.request(spec)
        if idx == 5:
            engine.add_job("j", 64)
            engine.add_step("j", "bob", [engine.limits.max_pack_tokens])
        for _ in range(rng.choice((0, 1, 5))):
            engine.step()
    finish(engine)
    engine.check_finished()
    return [
        (
            [(s.sequence_id, s.start, s.num_tokens) for s in plan.forward],
            plan.backward,
            plan.memory.preempted,
            plan.memory.dropped_packs,
        )
        for plan in engine.plans
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_what_is_cached_is_in_nobodys_way(make_engine: Callable[..., Any], seed: int) -> None:
    assert plans_of(make_engine, seed, with_cache=True) == plans_of(make_engine, seed, with_cache=False)


def small_caps() -> StaticCapPolicy:
    """Caps of the size of the small limits."""
    return StaticCapPolicy(max_tokens=24, max_train_tokens=16, num_layers=1)


@pytest.mark.parametrize(
    "make_policy", [AlternatingPolicy, NoCoservingPolicy, small_caps], ids=lambda p: p.__name__
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_other_policies_break_no_rule_of_the_engine_either(
    make_engine: Callable[..., Any], make_policy: Callable[[], Policy], seed: int
) -> None:
    rng = random.Random(seed)
    engine = make_engine(seed, policy=make_policy(), **random_setting(rng))
    drive(engine, rng, rng.randint(10, 200), rng.choice((0, 1, 3, 12)))
