"""The prefix cache in the scheduler: who shares whose blocks, when, and that the cache is in nobody's way.

That a hit finds exactly its own tenant's, adapter's and tokens' contents is checked by the simulated engine.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft_scheduler import CostModel, LatencyTargets, Scheduler, SegmentKind, StepResult

PROMPT = list(range(100, 130))
LIMITS: dict[str, Any] = {"inference_reserve_blocks": 0}


def starts(engine: Any, sequence_id: str) -> list[int]:
    """Where the prompt chunks of a sequence began."""
    return [
        s.start
        for plan in engine.plans
        for s in plan.forward
        if s.sequence_id == sequence_id and s.kind is SegmentKind.PREFILL
    ]


def num_prefilled(engine: Any) -> int:
    chunks = (s for plan in engine.plans for s in plan.forward if s.kind is SegmentKind.PREFILL)
    return sum(s.num_tokens for s in chunks)


@pytest.mark.parametrize(("length", "num_cached"), [(30, 28), (28, 24), (29, 28), (5, 4), (4, 0), (3, 0)])
@pytest.mark.parametrize("max_inflight", [1, 2])
def test_a_prompt_computed_before_is_not_computed_again_but_for_its_last_block(
    make_engine: Callable[..., Any],
    request_spec: Callable[..., Any],
    length: int,
    num_cached: int,
    max_inflight: int,
) -> None:
    engine = make_engine(max_inflight=max_inflight)
    for name in ("first", "second"):
        engine.request(request_spec(name, PROMPT[:length]))
        engine.run()
    assert starts(engine, "first")[0] == 0
    assert starts(engine, "second") == [num_cached]
    assert engine.requests["second"].num_cached == num_cached
    assert engine.scheduler.num_prefix_hits == num_cached
    assert engine.scheduler.num_prefix_queries == 2 * length
    engine.check_finished()


def test_the_next_turn_of_a_conversation_finds_the_answer_too(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine()
    engine.request(request_spec("first", PROMPT[:10], max_new_tokens=9))
    engine.run()
    engine.request(request_spec("second", [*PROMPT[:10], *engine.requests["first"].tokens, 5, 6]))
    engine.run()
    # Of ten prompt and nine new tokens, the newest was never fed back: 18 were computed, 16 fill blocks.
    assert starts(engine, "second") == [16]


@pytest.mark.parametrize(
    "other", [{"tenant": "u"}, {"adapter": "a"}, {"token_ids": [1, *PROMPT[1:]]}, {"token_ids": None}]
)
def test_another_tenant_adapter_or_beginning_finds_nothing(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any], other: dict[str, Any]
) -> None:
    engine = make_engine()
    engine.request(request_spec("first", PROMPT))
    engine.run()
    engine.request(request_spec("second", **({"token_ids": PROMPT} | other)))
    engine.run()
    assert starts(engine, "second")[0] == 0
    assert engine.scheduler.num_prefix_hits == 0


def test_a_request_that_does_not_read_computes_all_and_leaves_its_blocks_to_others(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine()
    for name, is_read in (("first", False), ("second", False), ("third", True)):
        engine.request(request_spec(name, PROMPT, is_read))
        engine.run()
    assert [starts(engine, name)[0] for name in ("first", "second", "third")] == [0, 0, 28]
    assert engine.scheduler.num_prefix_queries == len(PROMPT)


@pytest.mark.parametrize("max_inflight", [1, 2, 3])
def test_a_herd_with_one_prompt_computes_it_once(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any], max_inflight: int
) -> None:
    engine = make_engine(max_inflight=max_inflight, max_batch_tokens=20, num_blocks=128)
    prompt = list(range(100))
    for idx in range(8):
        engine.request(request_spec(f"r{idx}", prompt, max_new_tokens=20))
    engine.run()
    assert num_prefilled(engine) == 100 + 7 * 4
    assert engine.scheduler.num_preemptions == 0
    engine.check_finished()


def test_siblings_that_wait_hold_up_nobody_else(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_num_seqs=7)
    for name in ("a0", "a1", "a2"):
        engine.request(request_spec(name, PROMPT))
    for name in ("b0", "b1", "b2"):
        engine.request(request_spec(name, PROMPT[::-1]))
    engine.request(request_spec("c"))
    plan = engine.step()
    assert [s.sequence_id for s in plan.forward] == ["a0", "b0", "c"]
    plan = engine.step()
    assert {s.sequence_id for s in plan.forward} == {"a0", "a1", "a2", "b0", "b1", "b2", "c"}
    engine.run()
    engine.check_finished()


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_when_the_one_who_computes_goes_the_next_takes_over(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any], max_inflight: int
) -> None:
    engine = make_engine(max_batch_tokens=20, max_inflight=max_inflight)
    prompt = list(range(100))
    for idx in range(3):
        engine.request(request_spec(f"r{idx}", prompt))
    for _ in range(3):
        engine.step()
    engine.abort("r0")
    engine.run()
    # What the plans in flight at the abort would have written is nobody's.
    assert starts(engine, "r1")[0] == 20 * (3 - max_inflight)
    assert starts(engine, "r2") == [96]
    engine.check_finished()


def test_blocks_are_not_shared_before_the_plan_that_fills_them_is_committed(
    make_limits: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    scheduler = Scheduler(make_limits(max_inflight=2), CostModel(), LatencyTargets(0.05, 2.0))
    scheduler.add_request(request_spec("first", PROMPT, max_new_tokens=1), 0.0)
    running = scheduler.plan(0.0)
    scheduler.add_request(request_spec("second", PROMPT), 0.0)
    assert scheduler.plan(0.0).is_empty
    assert scheduler.abort("first")
    scheduler.commit(running, StepResult({}, 0.01), 0.0)
    assert [(s.sequence_id, s.start) for s in scheduler.plan(0.0).forward] == [("second", 0)]


@pytest.mark.parametrize("is_preempted", [False, True])
def test_nothing_is_found_of_a_sequence_that_failed(
    make_limits: Callable[..., Any], request_spec: Callable[..., Any], is_preempted: bool
) -> None:
    scheduler = Scheduler(
        make_limits(max_inflight=2, num_blocks=10, **LIMITS), CostModel(), LatencyTargets(0.05, 2.0)
    )
    scheduler.add_request(request_spec("old", num_prompt_tokens=4, max_new_tokens=30), 0.0)
    scheduler.add_request(request_spec("bad", PROMPT[:27], max_new_tokens=9), 0.0)
    running = scheduler.plan(0.0)
    for _ in range(30):
        following = scheduler.plan(0.0)
        if scheduler.num_preemptions if is_preempted else following.iteration == 4:
            break
        scheduler.commit(running, StepResult({s.sequence_id: 1 for s in running.forward}, 0.01), 0.0)
        running = following
    assert "bad" in {s.sequence_id for s in running.forward}
    assert scheduler.num_preemptions == is_preempted
    assert scheduler.fail("bad")
    assert not scheduler.fail("bad")
    for plan in (running, following):
        scheduler.commit(plan, StepResult({"old": 1}, 0.01), 0.0)
    scheduler.abort("old")
    scheduler.add_request(request_spec("next", PROMPT[:27]), 0.0)
    assert [s.start for s in scheduler.plan(0.0).forward] == [0]
    scheduler.check_invariants()


def test_the_chunks_of_a_failed_prompt_that_were_committed_are_forgotten(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_batch_tokens=20)
    engine.request(request_spec("bad", PROMPT))
    engine.step()
    engine.step()
    assert engine.scheduler.fail("bad")
    engine.lose("bad")
    engine.request(request_spec("next", PROMPT))
    engine.run()
    assert starts(engine, "next")[0] == 0
    engine.check_finished()


def test_a_preempted_sequence_finds_its_own_blocks_again(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(num_blocks=16, **LIMITS)
    engine.request(request_spec("old", PROMPT[:20], max_new_tokens=18))
    engine.request(request_spec("young", PROMPT[::-1], max_new_tokens=18))
    engine.run()
    assert engine.scheduler.num_preemptions == 1
    first, again = starts(engine, "young")
    assert first == 0
    assert again >= 8
    assert engine.requests["young"].num_cached == 0, "what is reported is what was found at first"
    engine.check_finished()


def test_cached_blocks_are_free_for_everybody(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(num_blocks=16, **LIMITS)
    for idx in range(8):
        engine.request(request_spec(f"r{idx}", [idx] * 30))
        engine.run()
    assert engine.scheduler.kv_usage == 0
    engine.add_job("j", 64)
    while engine.scheduler.adapter_slot("job:j") is None:
        engine.step()
    engine.add_step("j", "t", [64])
    engine.run()
    engine.request(request_spec("large", num_prompt_tokens=60, max_new_tokens=5))
    plan = engine.step()
    assert plan.num_forward_tokens == 60
    engine.run()
    assert (engine.scheduler.num_preemptions, engine.scheduler.num_packs_dropped) == (0, 0)
    engine.check_finished()


def test_requests_that_share_their_beginning_fit_where_copies_would_not(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(num_blocks=20, max_batch_tokens=20, **LIMITS)
    for idx in range(4):
        engine.request(request_spec(f"r{idx}", [*range(40), idx], max_new_tokens=3))
    engine.step()
    while len(engine.requests["r0"].tokens) < 1:
        engine.step()
    plan = engine.step()
    assert len({s.sequence_id for s in plan.forward}) == 4
    assert engine.scheduler.num_blocks_held == 10 + 4
    engine.run()
    assert engine.scheduler.num_preemptions == 0


def test_a_tenant_is_charged_for_what_was_computed_of_its_prompts(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_num_seqs=1, num_blocks=2048, max_batch_tokens=4096, max_model_len=4096)
    for idx in range(60):
        for tenant, token in (("same", 0), ("fresh", idx)):
            prompt = [token] * 4001
            engine.request(request_spec(f"{tenant}{idx}", prompt, tenant=tenant, max_new_tokens=1))
    for _ in range(60):
        engine.step()
    done = {
        t: sum(len(r.tokens) for n, r in engine.requests.items() if n.startswith(t))
        for t in ("same", "fresh")
    }
    assert done["same"] > 5 * done["fresh"] > 0


def test_token_ids_that_do_not_fit_the_prompt_are_refused(
    make_limits: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    scheduler = Scheduler(make_limits(), CostModel(), LatencyTargets(0.05, 2.0))
    spec = request_spec("r", PROMPT)
    with pytest.raises(ValueError, match="prefix has 30 token ids; give those of all 10 prompt tokens"):
        scheduler.add_request(request_spec("r", prefix=spec.prefix), 0.0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_who_waits_for_a_sibling_waits_only_while_that_one_computes_its_prompt(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any], seed: int
) -> None:
    rng = random.Random(seed)
    engine = make_engine(
        seed, num_blocks=2048, max_num_seqs=64, max_batch_tokens=rng.choice((72, 200)),
        max_inflight=rng.choice((1, 2, 3)), max_train_tokens=0, inference_reserve_blocks=0,
    )  # fmt: skip
    size = engine.limits.block_size
    for idx in range(rng.randint(2, 40)):
        prompt = [rng.randint(0, 1)] * rng.randint(1, 60) + [rng.randint(0, 1)] * rng.randint(1, 60)
        engine.request(request_spec(f"r{idx}", prompt, is_read=rng.random() < 0.9))
        if rng.random() < 0.2:
            engine.abort(rng.choice(list(engine.requests)))
        if rng.random() < 0.5:
            plan = engine.step()
            if plan.num_forward_tokens < engine.limits.max_batch_tokens and plan.predicted_s < plan.budget_s:
                assert_all_waiters_have_a_sibling(engine, size)
    engine.run()
    engine.check_finished()


def assert_all_waiters_have_a_sibling(engine: Any, size: int) -> None:
    """Nothing else is short: whoever was not admitted shares a block with one that has not sampled yet."""
    alive = [r for r in engine.requests.values() if r.finish_reason is None]
    computing = [r for r in alive if r.num_cached is not None and not r.tokens]
    for waiter in (r for r in alive if r.num_cached is None):
        own = list(waiter.spec.prefix.token_ids)
        shared = (
            end
            for sibling in computing
            for end in range(size, len(own), size)
            if own[:end] == list(sibling.spec.prefix.token_ids[:end])
        )
        assert any(shared), f"{waiter.spec.sequence_id} waits for nobody"
