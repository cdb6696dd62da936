"""Shares across tenants and across inference and finetuning, on a simulated clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft_scheduler.budget import LatencyTargets
from weft_scheduler.charging import Pieces, split_time
from weft_scheduler.plan import SegmentKind

prices = st.floats(1e-6, 10.0)


def pieces(items: list[tuple[str, float]]) -> Pieces:
    made = Pieces()
    for tenant, price_s in items:
        made.add(tenant, price_s)
    return made


@given(
    elapsed_s=prices,
    inference=st.lists(st.tuples(st.sampled_from("abc"), prices), min_size=1, max_size=8),
    training=st.lists(st.tuples(st.sampled_from("bcd"), prices), max_size=8),
    alone=st.tuples(prices, prices),
    seed=st.integers(0, 2**16),
)
def test_charges_add_up_to_the_iteration_and_do_not_depend_on_the_order_of_the_plan(
    elapsed_s: float,
    inference: list[tuple[str, float]],
    training: list[tuple[str, float]],
    alone: tuple[float, float],
    seed: int,
) -> None:
    training_s = alone[1] if training else 0.0
    charges = split_time(elapsed_s, (pieces(inference), alone[0]), (pieces(training), training_s))
    assert sum(charges.values()) == pytest.approx(elapsed_s)
    rng = random.Random(seed)
    rng.shuffle(inference)
    rng.shuffle(training)
    again = split_time(elapsed_s, (pieces(inference), alone[0]), (pieces(training), training_s))
    assert again == pytest.approx(charges)


class Backlog:
    """Keeps a tenant backlogged with requests that wait."""

    def __init__(self, engine: Any, request_spec: Callable[..., Any], seed: int) -> None:
        self.engine, self.request_spec, self.rng = engine, request_spec, random.Random(seed)
        self.num_requests = 0

    def flood(self, tenant: str, most_prompt: int, most_new: int, depth: int) -> None:
        """At least `depth` unfinished requests, of random lengths up to the given ones."""
        mine = [r for r in self.engine.requests.values() if r.spec.tenant == tenant]
        for _ in range(depth - sum(r.finish_reason is None for r in mine)):
            self.num_requests += 1
            spec = self.request_spec(
                f"{tenant}{self.num_requests}",
                tenant=tenant,
                num_prompt_tokens=self.rng.randint(1, most_prompt),
                max_new_tokens=self.rng.randint(1, most_new),
            )
            self.engine.request(spec)

    def steps(self, seconds: float) -> Iterator[None]:
        """Iterations until so much simulated time has passed."""
        end = self.engine.now + seconds
        while self.engine.now < end:
            yield
            self.engine.step()


def longest_request_s(engine: Any, most_prompt: int, most_new: int) -> float:
    """The longest that one request can be charged for: every iteration of its life, all for itself."""
    cost = engine.scheduler.cost
    context = most_prompt + most_new
    return float(cost.chunk_s(most_prompt, context) + most_new * cost.decode_s(context))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**20),
    lengths=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    new=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_two_backlogged_tenants_never_drift_apart_whatever_their_lengths(
    make_engine: Callable[..., Any],
    request_spec: Callable[..., Any],
    seed: int,
    lengths: tuple[int, int],
    new: tuple[int, int],
) -> None:
    engine = make_engine(seed=seed, max_num_seqs=4, num_blocks=160)
    backlog = Backlog(engine, request_spec, seed)
    # A place is taken back after max_wait_s; what runs beyond that is at most every place, to its end.
    bound_s = engine.limits.max_wait_s + 4 * max(
        longest_request_s(engine, lengths[i], new[i]) for i in (0, 1)
    )
    for _ in backlog.steps(20.0):
        backlog.flood("a", lengths[0], new[0], depth=12)
        backlog.flood("b", lengths[1], new[1], depth=12)
        service = engine.scheduler.service_s
        assert abs(service["a"] - service["b"]) <= bound_s


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_flood_of_prompts_leaves_another_tenants_job_its_share(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any], weight: float
) -> None:
    engine = make_engine(tenant_weights={"trainer": weight})
    backlog = Backlog(engine, request_spec, 0)
    engine.train_endlessly("j", "trainer", [64])
    for _ in backlog.steps(30.0):
        backlog.flood("flood", most_prompt=60, most_new=3, depth=20)
    service = engine.scheduler.service_s
    share = service["trainer"] / sum(service.values())
    assert share >= 0.9 * weight / (1.0 + weight)
    assert service["flood"] > 0.0


def test_a_tenant_within_its_share_never_waits_for_finetuning(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(targets=LatencyTargets(0.05, 0.2))
    backlog = Backlog(engine, request_spec, 0)
    engine.train_endlessly("j", "trainer", [64])
    next_s = 1.0
    for _ in backlog.steps(30.0):
        if engine.now >= next_s:
            next_s += 0.5
            engine.request(request_spec(f"r{next_s}", tenant="chat", num_prompt_tokens=8, max_new_tokens=4))
    waits = [r.first_token_s - r.arrival_s for r in engine.requests.values() if r.first_token_s is not None]
    service = engine.scheduler.service_s
    assert service["chat"] < service["trainer"]
    assert max(waits) <= 0.2


def test_within_one_tenant_inference_always_goes_before_finetuning(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine()
    backlog = Backlog(engine, request_spec, 0)
    engine.train_endlessly("j", "t", [64])
    for _ in backlog.steps(10.0):
        backlog.flood("t", most_prompt=60, most_new=3, depth=20)
    held = [
        plan for plan in engine.plans[10:] if not any(s.kind is not SegmentKind.TRAIN for s in plan.forward)
    ]
    assert not held, "prompts waited although their own tenant trains"


def test_a_request_takes_a_place_from_a_tenant_that_holds_them_all(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_num_seqs=4, num_blocks=400, max_model_len=1000)
    for idx in range(4):
        engine.request(request_spec(f"long{idx}", tenant="a", num_prompt_tokens=4, max_new_tokens=300))
    for _ in range(20):
        engine.step()
    engine.request(request_spec("short", tenant="b", num_prompt_tokens=4, max_new_tokens=3))
    arrived_s = engine.now
    engine.run()
    assert engine.requests["short"].first_token_s - arrived_s <= engine.limits.max_wait_s + 0.2
    assert engine.scheduler.num_preemptions == 1
    engine.check_finished()


def test_a_tenant_with_its_part_of_the_places_takes_no_more(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_num_seqs=4, num_blocks=400, max_model_len=1000)
    for tenant in ("a", "b"):
        for idx in range(6):
            engine.request(
                request_spec(f"{tenant}{idx}", tenant=tenant, num_prompt_tokens=4, max_new_tokens=300)
            )
    engine.run()
    assert engine.scheduler.num_preemptions == 0
    engine.check_finished()


def test_no_place_is_taken_for_a_tenant_that_would_not_get_it(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_num_seqs=4, num_blocks=1000, max_model_len=1000)
    for idx in range(6):
        engine.request(request_spec(f"long{idx}", tenant="a", num_prompt_tokens=4, max_new_tokens=900))
    engine.request(request_spec("far-ahead", tenant="b", num_prompt_tokens=4, max_new_tokens=3))
    engine.scheduler._state.shares.charge("b", 100.0)
    while engine.now < 4 * engine.limits.max_wait_s:
        engine.step()
    assert engine.scheduler.num_preemptions == 0


def test_blocks_are_taken_from_the_tenant_that_holds_most_of_them(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(num_blocks=40, inference_reserve_blocks=0, max_num_seqs=8)
    for idx in range(5):
        engine.request(request_spec(f"big{idx}", tenant="big", num_prompt_tokens=20, max_new_tokens=40))
    for _ in range(6):
        engine.step()
    engine.request(request_spec("small", tenant="small", num_prompt_tokens=4, max_new_tokens=20))
    engine.run()
    victims = {name for plan in engine.plans for name in plan.memory.preempted}
    assert victims
    assert "small" not in victims
    engine.check_finished()


def test_a_pack_that_has_waited_long_keeps_only_its_own_blocks_from_requests(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(num_blocks=64, inference_reserve_blocks=16, max_training_wait_s=0.5)
    engine.request(request_spec("long", tenant="a", num_prompt_tokens=80, max_new_tokens=40))
    for _ in range(3):
        engine.step()
    engine.add_job("j", 64)
    engine.add_step("j", "b", [96])
    while engine.now < 0.7:
        engine.step()
    engine.request(request_spec("short", tenant="c", num_prompt_tokens=8, max_new_tokens=3))
    arrived_s = engine.now
    engine.run()
    assert engine.requests["short"].first_token_s - arrived_s < 0.2
