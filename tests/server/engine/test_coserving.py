"""Inference and finetuning share iterations and change nothing of each other."""

from __future__ import annotations

import json

import pytest
import torch

from weft_scheduler import PlanFeatures
from weft_scheduler.plan import SegmentKind
from weft_scheduler.policies import POLICIES, StaticCapPolicy
from weft_scheduler.simulator.fitted import read_fitted
from weft_server.protocol import JobFailed, JobSucceeded

LENGTHS = (31, 12, 44, 7, 26, 19, 33, 9, 15, 40)
TRICKLE_MS = 1e-3  # a target that no iteration meets: finetuning gets a unit now and then


def _generate(h, make, num_requests=5, max_tokens=40):
    adapter = h.store(make.adapter(1))
    for i in range(num_requests):
        h.generate(
            f"r{i}", make.prompt(4 + 7 * i, i), adapter=adapter if i % 2 else None, max_tokens=max_tokens
        )


def _kinds(plan):
    kinds = {segment.kind for segment in plan.forward}
    return kinds | {SegmentKind.TRAIN} if plan.backward else kinds


def _weights(h, job_id="job"):
    return h.trained(job_id).weights


@pytest.mark.parametrize("pipeline_depth", [0, 1])
@pytest.mark.parametrize("tpot_slo_ms", [60_000.0, TRICKLE_MS])
def test_training_beside_inference_changes_neither(tpot_slo_ms, pipeline_depth, harness, make):
    alone, training, both = (
        harness(),
        harness(),
        harness(tpot_slo_ms=tpot_slo_ms, pipeline_depth=pipeline_depth),
    )
    for h in (alone, both):
        _generate(h, make)
    for h in (training, both):
        h.start_job("job", make.dataset(LENGTHS), make.spec())
        h.run()
    alone.run()
    for i in range(5):
        assert both.tokens(f"r{i}") == alone.tokens(f"r{i}")
        assert len(both.tokens(f"r{i}")) == 40
    assert len(both.losses("job")) == 5
    assert both.losses("job") == pytest.approx(training.losses("job"), abs=1e-4)
    torch.testing.assert_close(_weights(both), _weights(training), rtol=1e-3, atol=1e-4)
    mixed = [plan for plan in both.plans if {SegmentKind.DECODE, SegmentKind.TRAIN} <= _kinds(plan)]
    assert mixed, "decodes and finetuning never shared an iteration"
    assert any(SegmentKind.TRAIN in {s.kind for s in plan.forward} for plan in mixed)


@pytest.mark.parametrize("policy", ["alternating", "static-cap", "no-coserving"])
def test_another_policy_changes_when_things_run_and_nothing_else(policy, harness, make):
    chosen = StaticCapPolicy(48, 32, 1) if policy == "static-cap" else POLICIES[policy]()
    weft, other = harness(), harness(policy=chosen, pipeline_depth=1)
    for h in (weft, other):
        _generate(h, make)
        h.start_job("job", make.dataset(LENGTHS), make.spec())
        h.run()
    assert [other.tokens(f"r{i}") for i in range(5)] == [weft.tokens(f"r{i}") for i in range(5)]
    assert other.losses("job") == pytest.approx(weft.losses("job"), abs=1e-4)
    mixed = [plan for plan in other.plans if {SegmentKind.DECODE, SegmentKind.TRAIN} <= _kinds(plan)]
    assert bool(mixed) is (policy == "static-cap")


def test_an_engine_describes_its_device_for_simulations(harness, make):
    h = harness(tpot_slo_ms=123.0)
    _generate(h, make)
    h.run()
    fitted = read_fitted(json.dumps(h.describe_device()))
    assert (fitted.model, fitted.slo.tpot_s, fitted.max_pack_tokens) == ("tiny", 0.123, 64)
    assert fitted.limits == h.scheduler.limits
    features = PlanFeatures(forward_tokens=20, num_sequences=5)
    cost = h.scheduler.cost
    assert fitted.cost.predict(features) * cost.pace == pytest.approx(cost.predict(features))


def test_the_loss_falls_and_the_trained_adapter_can_be_served(harness, make, oracle):
    h = harness()
    spec = make.spec(total_steps=40, batch_size=2)
    h.start_job("job", make.dataset((20, 14)), spec)
    h.run()
    losses = h.losses("job")
    assert losses[-1] < 0.5 * losses[0]
    assert [m.step for m in h.progress("job")] == list(range(1, 41))
    done = h.ended("job")
    assert isinstance(done, JobSucceeded)
    assert (done.step, done.max_rank, done.trained_tokens) == (40, 4, 40 * 34)
    prompt = make.prompt(8)
    h.generate("tuned", prompt, adapter=done.adapter, max_tokens=10)
    h.run()
    assert h.tokens("tuned") == oracle.greedy(prompt, 10, h.trained("job"))
    assert h.tokens("tuned") != oracle.greedy(prompt, 10)


def test_jobs_of_two_tenants_train_in_one_wave_as_each_would_alone(harness, make):
    jobs = {
        "a": ("first", make.dataset(LENGTHS, seed=1), make.spec(seed=1)),
        "b": ("second", make.dataset(LENGTHS, seed=2), make.spec(seed=2, batch_size=3, learning_rate=1e-3)),
    }
    together = harness()
    for job_id, (tenant, dataset, spec) in jobs.items():
        together.start_job(job_id, dataset, spec, tenant=tenant)
    together.run()
    waves = [{pack_id.split("/")[0] for pack_id in s.pack_ids} for p in together.plans for s in p.backward]
    assert {"a", "b"} in waves
    for job_id, (tenant, dataset, spec) in jobs.items():
        alone = harness()
        alone.start_job(job_id, dataset, spec, tenant=tenant)
        alone.run()
        assert together.losses(job_id) == pytest.approx(alone.losses(job_id), abs=1e-4)
        torch.testing.assert_close(_weights(together, job_id), _weights(alone, job_id), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pipeline_depth", [0, 1])
def test_packs_dropped_under_pressure_end_with_the_same_losses(pipeline_depth, harness, make):
    alone = harness()
    alone.start_job("job", make.dataset(LENGTHS), make.spec())
    alone.run()
    tiny = harness(num_blocks=44, max_model_len=120, tpot_slo_ms=TRICKLE_MS, pipeline_depth=pipeline_depth)
    tiny.start_job("job", make.dataset(LENGTHS), make.spec())
    sent = 0
    for _ in tiny.steps():
        num_requests = tiny.scheduler.num_running + tiny.scheduler.num_waiting
        if sent < 12 and num_requests < 2 and (tiny.scheduler.num_packs or num_requests):
            tiny.generate(f"r{sent}", make.prompt(30, sent), max_tokens=60)
            sent += 1
        if not tiny.engine.has_work and not tiny.engine.awaits_background:
            break
    assert sent == 12
    tiny.scheduler.check_invariants()
    assert tiny.scheduler.num_packs_dropped > 0
    assert tiny.scheduler.kv_usage == 0
    assert all(len(tiny.tokens(f"r{i}")) == 60 for i in range(12))
    assert tiny.losses("job") == pytest.approx(alone.losses("job"), abs=1e-4)
    torch.testing.assert_close(_weights(tiny), _weights(alone), rtol=1e-3, atol=1e-4)


def test_a_job_on_an_adapter_continues_training_it(harness, make):
    h = harness()
    dataset, spec = make.dataset((20, 14)), make.spec(total_steps=20, batch_size=2, lr_scheduler="constant")
    h.start_job("first", dataset, spec)
    h.run()
    first = h.ended("first")
    h.start_job("second", dataset, spec, base_adapter=first.adapter)
    h.run()
    assert h.losses("second")[0] < h.losses("first")[-1]


# ---------------------------------------------------------------- failures


def _poisoned(make):
    return make.adapter(5, std=1e25)


def test_a_poisoned_job_fails_alone_with_step_and_line_named(harness, make):
    alone = harness()
    alone.start_job("good", make.dataset(LENGTHS), make.spec())
    alone.run()
    h = harness(num_blocks=48, max_model_len=100)
    bad = h.store(_poisoned(make))
    h.start_job("bad", make.dataset(LENGTHS, seed=8), make.spec(), tenant="careless", base_adapter=bad)
    h.start_job("good", make.dataset(LENGTHS), make.spec())
    _generate(h, make)
    h.run()
    failed = h.ended("bad")
    assert isinstance(failed, JobFailed)
    assert failed.code == "non_finite_loss"
    assert "step 1" in failed.message
    assert "line " in failed.message
    assert h.losses("good") == pytest.approx(alone.losses("good"), abs=1e-4)
    torch.testing.assert_close(_weights(h, "good"), _weights(alone, "good"), rtol=1e-3, atol=1e-4)
    assert all(len(h.tokens(f"r{i}")) == 40 for i in range(5))
    assert not h.failures()
    assert h.scheduler.kv_usage == 0


def test_a_job_whose_learning_rate_explodes_fails_at_its_second_step(harness, make):
    h = harness()
    h.start_job("job", make.dataset(LENGTHS), make.spec(learning_rate=1e30, lr_scheduler="constant"))
    h.run()
    failed = h.ended("job")
    assert isinstance(failed, JobFailed)
    assert "step 2" in failed.message
    assert len(h.progress("job")) == 1


def test_cached_nans_reach_nobody_who_gets_their_blocks(harness, make, oracle):
    h = harness(num_blocks=24, max_model_len=90)
    poison = h.store(_poisoned(make))
    h.generate("ends by itself", make.prompt(60), adapter=poison)
    h.generate("aborted in its prompt", make.prompt(80, 1), adapter=poison)
    h.start_job("bad", make.dataset((60, 30)), make.spec(), base_adapter=poison)
    h.run(until=lambda: h.ended("bad") is not None)
    h.abort("aborted in its prompt")
    h.run()
    failure = h.failures()["ends by itself"]
    assert (failure.status, failure.code) == (500, "non_finite_logits")
    cache = h.runner._cache
    num_poisoned = sum(int((~torch.isfinite(k)).any(dim=(1, 2, 3)).sum()) for k in cache.keys)
    assert num_poisoned > 24, "nothing was poisoned: the test shows nothing"
    for i in range(4):
        h.generate(f"r{i}", make.prompt(3 + i, i), max_tokens=9)
    h.start_job("good", make.dataset(LENGTHS), make.spec())
    h.run()
    for i in range(4):
        assert h.tokens(f"r{i}") == oracle.greedy(make.prompt(3 + i, i), 9)
    clean = harness()
    clean.start_job("good", make.dataset(LENGTHS), make.spec())
    clean.run()
    assert h.losses("good") == pytest.approx(clean.losses("good"), abs=1e-4)


@pytest.mark.parametrize(
    ("damage", "code"),
    [("long", "example_too_long"), ("vocabulary", "bad_dataset"), ("bytes", "bad_dataset")],
)
def test_a_bad_dataset_fails_its_job_before_it_trains(damage, code, harness, make):
    h = harness(max_model_len=100)
    datasets = {
        "long": make.dataset((20, 30, 101, 5)),
        "vocabulary": make.dataset((20, 30)).replace(b"\x0c\x00\x00\x00", b"\x7f\x00\x00\x00"),
        "bytes": b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ",
    }
    h.start_job("bad", datasets[damage], make.spec(batch_size=1))
    h.start_job("good", make.dataset(LENGTHS), make.spec())
    h.run()
    failed = h.ended("bad")
    assert isinstance(failed, JobFailed)
    assert failed.code == code
    assert damage != "long" or "line 3 has 101 tokens" in failed.message
    assert isinstance(h.ended("good"), JobSucceeded)


def test_what_freed_blocks_held_changes_no_answer_and_no_gradient(harness, make, oracle):
    """Another tenant's NaN in every place of the cache that is not written anew."""
    clean, poisoned = harness(), harness()
    for cache in (*poisoned.runner._cache.keys, *poisoned.runner._cache.values):
        cache.fill_(torch.nan)
    prompts = {f"r{length}": make.prompt(length) for length in (1, 5, 9, 40)}
    for h in (clean, poisoned):
        for request_id, prompt in prompts.items():
            h.generate(request_id, prompt, max_tokens=10)
        h.start_job("job", make.dataset((31, 12, 44, 7)), make.spec(total_steps=3))
        h.run()
    for request_id, prompt in prompts.items():
        assert poisoned.tokens(request_id) == oracle.greedy(prompt, 10)
    assert poisoned.losses("job") == pytest.approx(clean.losses("job"), rel=1e-5)
