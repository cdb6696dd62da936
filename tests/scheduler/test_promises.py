"""Promises of the scheduler as its users would put them, each with the least that it takes to break it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weft_scheduler.budget import LatencyTargets
from weft_scheduler.cost import CostModel, PlanFeatures
from weft_scheduler.requests import ServiceTier
from weft_scheduler.simulator.readers import TraceError, read_trace


def run_for(engine: Any, seconds: float) -> None:
    """Step until so much simulated time has passed."""
    end = engine.now + seconds
    while engine.now < end:
        engine.step()


def first_token_wait_s(engine: Any, sequence_id: str) -> float:
    """How long a request has waited for its first token, or waits already."""
    request = engine.requests[sequence_id]
    end = engine.now if request.first_token_s is None else request.first_token_s
    return float(end - request.arrival_s)


@pytest.fixture
def roomy(make_engine: Callable[..., Any]) -> Callable[..., Any]:
    """An engine in which neither blocks nor activations of packs are scarce."""

    def make(**overrides: Any) -> Any:
        return make_engine(**({"num_blocks": 2000, "max_train_tokens": 4096} | overrides))

    return make


def test_a_trainers_own_request_is_served_beside_a_smaller_job(
    roomy: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = roomy()
    engine.train_endlessly("large", "a", [32] * 8)
    engine.train_endlessly("small", "b", [8])
    run_for(engine, 10.0)
    engine.request(request_spec("chat", tenant="a", num_prompt_tokens=8, max_new_tokens=4))
    run_for(engine, 20.0)
    assert first_token_wait_s(engine, "chat") <= 2.0


def test_a_tenant_far_below_its_share_does_not_wait_for_jobs(
    roomy: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = roomy()
    engine.train_endlessly("large", "a", [32] * 8)
    engine.train_endlessly("small", "b", [8])
    num_requests = 0
    while engine.now < 60.0:
        if engine.now >= 0.5 * num_requests:
            num_requests += 1
            engine.request(
                request_spec(f"c{num_requests}", tenant="chat", num_prompt_tokens=20, max_new_tokens=8)
            )
        engine.step()
    service = engine.scheduler.service_s
    assert service["chat"] < sum(service.values()) / 3
    assert max(first_token_wait_s(engine, name) for name in engine.requests) <= 2.0


def test_weights_divide_finetuning_between_two_tenants(roomy: Callable[..., Any]) -> None:
    engine = roomy(tenant_weights={"a": 4.0})
    engine.train_endlessly("ja", "a", [32])
    engine.train_endlessly("jb", "b", [32])
    run_for(engine, 30.0)
    service = engine.scheduler.service_s
    assert service["a"] >= 2.0 * service["b"]


def test_two_training_tenants_do_not_drift_apart_whatever_their_batches(roomy: Callable[..., Any]) -> None:
    engine = roomy()
    engine.train_endlessly("ja", "a", [32] * 8)
    engine.train_endlessly("jb", "b", [32])
    run_for(engine, 30.0)
    service = engine.scheduler.service_s
    assert abs(service["a"] - service["b"]) <= 5.0


def test_a_tenant_at_its_concurrency_does_not_fill_the_arena(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(num_blocks=4000, max_model_len=4000, latency=lambda: 0.01)
    engine.scheduler.set_max_concurrency({"hog": 1})
    for idx in range(12):
        engine.request(
            request_spec(
                f"h{idx}", tenant="hog", adapter=f"a{idx}", adapter_elements=512, max_new_tokens=2000
            )
        )
    run_for(engine, 3.0)
    engine.request(request_spec("victim", tenant="victim", adapter="v", adapter_elements=512))
    # One answer of the hog takes 20 s; only one of the four slots is ever in use.
    run_for(engine, 60.0)
    assert first_token_wait_s(engine, "victim") <= 40.0


def test_a_default_request_does_not_wait_for_its_tenants_flex_answers(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_num_seqs=4, num_blocks=4000, max_model_len=4000)
    for idx in range(4):
        engine.request(request_spec(f"flex{idx}", tenant="t", tier=ServiceTier.FLEX, max_new_tokens=2000))
    run_for(engine, 1.0)
    engine.request(request_spec("default", tenant="t"))
    run_for(engine, 10.0)
    assert first_token_wait_s(engine, "default") <= engine.limits.max_wait_s + 0.5


def test_a_default_request_does_not_wait_for_flex_answers_that_fill_its_tenants_concurrency(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_num_seqs=8, num_blocks=4000, max_model_len=4000)
    engine.scheduler.set_max_concurrency({"t": 2})
    for idx in range(2):
        engine.request(request_spec(f"flex{idx}", tenant="t", tier=ServiceTier.FLEX, max_new_tokens=2000))
    run_for(engine, 1.0)
    engine.request(request_spec("default", tenant="t"))
    run_for(engine, 10.0)
    assert first_token_wait_s(engine, "default") <= engine.limits.max_wait_s + 0.5


def test_no_flex_answer_is_preempted_for_a_place_that_another_tenant_would_get(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(max_num_seqs=4, num_blocks=4000, max_model_len=4000)
    for idx in range(4):
        engine.request(request_spec(f"flex{idx}", tenant="t", tier=ServiceTier.FLEX, max_new_tokens=3000))
    run_for(engine, 5.0)
    engine.request(request_spec("default", tenant="t"))
    for idx in range(40):
        engine.request(request_spec(f"other{idx}", tenant="other", max_new_tokens=200))
    run_for(engine, 20.0)
    assert engine.scheduler.num_preemptions <= 4


def test_a_generating_tenant_does_not_pay_for_the_adapter_that_another_trains(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    def charged(num_elements: int) -> float:
        engine = make_engine(noise=0.0, num_blocks=2000, arena_elements=64 * 10**9)
        engine.endless["j"] = ("trainer", [8])
        engine.add_job("j", num_elements)
        engine.add_step("j", "trainer", [8])
        engine.request(request_spec("r", tenant="chat", max_new_tokens=100))
        while engine.requests["r"].finish_reason is None:
            engine.step()
        return float(engine.scheduler.service_s["chat"])

    assert charged(64 * 10**8) <= 1.1 * charged(64)


def test_charges_of_finetuning_alone_add_up_to_the_time_that_it_took(
    make_engine: Callable[..., Any],
) -> None:
    engine = make_engine(noise=0.0, num_blocks=2000, arena_elements=64 * 10**9)
    engine.endless["j"] = ("trainer", [8])
    engine.add_job("j", 64 * 10**8)
    engine.add_step("j", "trainer", [8])
    elapsed_s = 0.0
    while engine.now < 5.0:
        elapsed_s += engine.step().predicted_s
    assert sum(engine.scheduler.service_s.values()) >= 0.99 * elapsed_s


def test_the_tenant_of_a_large_adapter_pays_for_it(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(noise=0.0, num_blocks=2000, arena_elements=64 * 10**9)
    for tenant, num_elements in (("large", 64 * 10**8), ("small", 64)):
        for idx in range(4):
            engine.request(
                request_spec(
                    f"{tenant}{idx}",
                    tenant=tenant,
                    adapter=tenant,
                    adapter_elements=num_elements,
                    max_new_tokens=100,
                )
            )
    engine.run()
    # Its elements are read in each of 100 iterations.
    extra_s = 100 * 64e8 * 0.7e-12
    service = engine.scheduler.service_s
    assert service["large"] - service["small"] >= 0.5 * extra_s


def test_a_time_that_is_not_finite_is_not_learnt() -> None:
    cost = CostModel()
    features = PlanFeatures(forward_tokens=8, kv_tokens_read=8, num_sequences=8)
    cost.observe(features, float("nan"))
    for _ in range(320):
        cost.observe(features, 0.02)
    assert cost.predict(features) == pytest.approx(0.02, rel=0.1)
    assert cost.error_p95 < 1.0


@pytest.mark.parametrize("weight", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_refused(make_engine: Callable[..., Any], weight: float) -> None:
    with pytest.raises(ValueError, match="positive, finite"):
        make_engine().scheduler.set_weight("t", weight)


_AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
_RECORD = '{"timestamp": 0, "input_length": 1000, "output_length": 5}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("zones.csv", _AZURE + "2023-11-16 18:15:46+00:00,5,7\n2023-11-16 18:15:46,5,7\n"),
        ("infinite.jsonl", _RECORD.replace("5}", "1e999}")),
        ("nan.jsonl", _RECORD + _RECORD.replace(": 0", ": NaN")),
        ("hashes.jsonl", _RECORD.replace("5}", '5, "hash_ids": ["a"]}')),
        ("clients.tar.gz", "no archive"),
    ],
)
def test_a_malformed_trace_is_refused_as_one(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(TraceError):
        read_trace(str(path))


def test_a_short_prompt_does_not_wait_for_another_tenants_long_one(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(num_blocks=40_000, max_model_len=100_000, max_batch_tokens=2048, max_num_seqs=16)
    engine.request(request_spec("long", tenant="long", num_prompt_tokens=60_000))
    engine.step()
    engine.request(request_spec("short", tenant="short"))
    while engine.requests["short"].first_token_s is None:
        engine.step()
    assert first_token_wait_s(engine, "short") <= 2.0


def test_an_arrival_does_not_wait_for_a_layer_of_a_wave_that_only_trickles(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any]
) -> None:
    engine = make_engine(
        targets=LatencyTargets(tpot_s=0.002, ttft_s=2.0, percentile=50.0),
        noise=0.0,
        num_blocks=600,
        max_train_tokens=4096,
        max_model_len=2000,
    )
    engine.train_endlessly("j", "trainer", [900])
    engine.request(request_spec("decodes", tenant="x", num_prompt_tokens=4, max_new_tokens=1900))
    wave = None
    while wave is None or wave.is_between_layers:
        engine.step()
        wave = engine.scheduler._state.training.wave
    engine.request(request_spec("large", tenant="y", num_prompt_tokens=1000, max_new_tokens=4))
    run_for(engine, 10.0)
    assert first_token_wait_s(engine, "large") <= 2.0


@pytest.mark.parametrize("elapsed_s", [float("inf"), 1e-300, 1e300])
def test_times_beyond_reason_break_nothing(elapsed_s: float) -> None:
    cost = CostModel()
    features = PlanFeatures(forward_tokens=8, kv_tokens_read=8, num_sequences=8)
    for _ in range(400):
        cost.observe(features, elapsed_s)
    assert 0.0 < cost.predict(features) < float("inf")


@pytest.mark.parametrize("weight", [0.01, 0.001])
def test_small_weights_are_kept(
    make_engine: Callable[..., Any], request_spec: Callable[..., Any], weight: float
) -> None:
    engine = make_engine(tenant_weights={"light": weight}, num_blocks=2000, max_num_seqs=1)
    for tenant in ("heavy", "light"):
        for idx in range(4000):
            engine.request(
                request_spec(f"{tenant}{idx}", tenant=tenant, num_prompt_tokens=4, max_new_tokens=2)
            )
    run_for(engine, 40.0)
    service = engine.scheduler.service_s
    assert service["light"] <= 1.5 * weight * service["heavy"] + 0.05
