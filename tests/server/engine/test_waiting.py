"""The host never waits for the device while it issues an iteration."""

from __future__ import annotations

import contextlib

import pytest
import torch

from weft_server.engine.history import TokenHistory
from weft_server.protocol import SamplingParams


@contextlib.contextmanager
def _waiting_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _submit_without_waiting(h):
    """From now on, whatever waits for the device inside the runner's `submit` raises."""
    submit = h.runner.submit

    def guarded(plan, jobs, *more):
        with _waiting_is_an_error():
            return submit(plan, jobs, *more)

    h.runner.submit = guarded


def _mixed_load(h, make, name):
    """Requests of every kind of sampling, adapters, and two jobs, one of them with dropout."""
    adapter = h.store(make.adapter(3, 8))
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.2}
    filters = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01}
    h.generate(f"{name}-plain", make.prompt(30), max_tokens=8)
    h.generate(f"{name}-adapter", make.prompt(20), adapter=adapter, max_tokens=8, logprobs=3)
    h.generate(f"{name}-penalties", make.prompt(9), max_tokens=8, **penalties)
    h.generate(f"{name}-filters", make.prompt(40), max_tokens=8, prompt_logprobs=1, **filters)
    h.generate(
        f"{name}-bias", make.prompt(7), max_tokens=8, logit_bias={4: 3.0}, min_tokens=3, stop_token_ids=(5,)
    )
    spec = make.spec(total_steps=2)
    h.start_job(f"{name}-job", make.dataset((31, 12, 44, 7)), spec)
    dropping = make.spec(total_steps=2, lora=make.lora(dropout=0.3))
    h.start_job(f"{name}-dropping", make.dataset((22, 15, 9)), dropping)


@pytest.mark.gpu
@pytest.mark.parametrize("pipeline_depth", [0, 1])
def test_issuing_an_iteration_never_waits_for_the_device(pipeline_depth, device, harness, make, oracle):
    if device.type != "cuda":
        pytest.skip("only CUDA reports what waits for the device")
    h = harness(pipeline_depth=pipeline_depth)
    # First without the guard: kernels are compiled and tuned at their first launch.
    _mixed_load(h, make, "first")
    h.run()
    _submit_without_waiting(h)
    _mixed_load(h, make, "second")
    h.run()
    assert not h.failures()
    assert len(h.losses("second-job")) == len(h.losses("second-dropping")) == 2
    assert h.tokens("second-plain") == oracle.greedy(make.prompt(30), 8)


def test_the_mixed_load_that_must_not_wait_runs_on_every_device(harness, make):
    h = harness(pipeline_depth=1)
    _mixed_load(h, make, "only")
    h.run()
    assert not h.failures()
    assert len(h.tokens("only-penalties")) == 8
    assert len(h.losses("only-job")) == len(h.losses("only-dropping")) == 2


def test_a_minimum_length_needs_no_token_from_the_host(harness, make):
    h = harness(pipeline_depth=1)
    h.generate("minimum", make.prompt(9), max_tokens=20, min_tokens=1, stop_token_ids=(3,))
    h.run()
    assert h.plans
    assert not any(h.runner.reads_uncollected_tokens(plan) for plan in h.plans)


def test_a_minimum_length_holds_in_a_pipeline(harness, make, oracle):
    """The stop token would be the first token; it is masked until the minimum, whatever is in flight."""
    prompt = make.prompt(9)
    first = oracle.greedy(prompt, 1)[0]
    h = harness(pipeline_depth=1)
    h.generate("minimum", prompt, max_tokens=12, min_tokens=5, stop_token_ids=(first,))
    h.run()
    assert first not in h.tokens("minimum")[:5]
    assert len(h.tokens("minimum")) >= 5


@pytest.mark.parametrize("cuts", [(7,), (1, 2, 3, 4, 5, 6, 7), (0, 3, 3, 7)])
def test_a_history_grown_step_by_step_is_that_of_the_whole_output(cuts, device):
    params = SamplingParams(max_tokens=9, repetition_penalty=1.3, presence_penalty=0.5)
    prompt, output = [4, 4, 9], [1, 2, 2, 9, 0, 2, 1]
    history = TokenHistory(params, prompt, 12, device)
    for cut in cuts:
        history.add(output[:cut])
    assert history.counts.tolist() == [output.count(token) for token in range(12)]
    assert history.seen.tolist() == [token in {*prompt, *output} for token in range(12)]
