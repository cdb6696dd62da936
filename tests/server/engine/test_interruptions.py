"""Arrivals during backward slices: those wait no longer than for the call under way, and finetuning loses
nothing.
"""

from __future__ import annotations

import random

import pytest
import torch

from weft_server.engine import runner

LENGTHS = (31, 12, 44, 7, 26, 19, 33, 9, 15, 40)


def _trained(h, make, **job):
    h.start_job("job", make.dataset(LENGTHS), make.spec(), **job)
    h.run()
    return h


def _count_backward_calls(h, during=lambda _: None):
    """The numbers of backward calls, as they are made; `during` is told each."""
    calls, run_slice = [], h.runner._backward.run_slice

    def counted(*args):
        calls.append(len(calls) + 1)
        during(calls[-1])
        run_slice(*args)

    h.runner._backward.run_slice = counted
    return calls


def _num_slices(h):
    return h.engine.heartbeat().counters["finetune_backward_slices"]


def _count_token_layers(h):
    """One item for every backward call: its tokens. Which packs share a slice is the scheduler's affair."""
    counts, run_slice, window = [], h.runner._backward.run_slice, h.scheduler.limits.window_tokens

    def counted(wave_id, placements, layer, windows, grads):
        ends = [min(windows.stop * window, placement.pack.num_tokens) for placement in placements]
        counts.append(sum(end - windows.start * window for end in ends))
        run_slice(wave_id, placements, layer, windows, grads)

    h.runner._backward.run_slice = counted
    return counts


@pytest.mark.parametrize("max_fused_tokens", [16, 256])
@pytest.mark.parametrize("how_often", [0.5, 1.0])
def test_interrupted_finetuning_ends_with_the_same_losses_and_weights(
    how_often, max_fused_tokens, device, harness, make, monkeypatch
):
    monkeypatch.setitem(runner._MAX_FUSED_TOKENS, device.type, max_fused_tokens)
    rng = random.Random(5)
    whole, cut = harness(), harness(has_arrivals=lambda: rng.random() < how_often)
    num_tokens = [_count_token_layers(h) for h in (whole, cut)]
    for h in (whole, cut):
        _trained(h, make)
    assert len(cut.plans) > len(whole.plans)
    assert sum(num_tokens[0]) == sum(num_tokens[1]) > 0
    assert cut.losses("job") == pytest.approx(whole.losses("job"), abs=1e-6)
    torch.testing.assert_close(cut.trained("job").weights, whole.trained("job").weights)
    assert cut.scheduler.kv_usage == 0


def test_interrupted_finetuning_beside_requests_changes_neither(harness, make, oracle):
    whole = _trained(harness(), make)
    h = harness(has_arrivals=lambda: True, num_blocks=44, max_model_len=120)
    for i in range(4):
        h.generate(f"r{i}", make.prompt(9 + i, i), max_tokens=30)
    _trained(h, make)
    for i in range(4):
        assert h.tokens(f"r{i}") == oracle.greedy(make.prompt(9 + i, i), 30)
    assert h.losses("job") == pytest.approx(whole.losses("job"), abs=1e-4)
    torch.testing.assert_close(h.trained("job").weights, whole.trained("job").weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("call", [1, 2])
def test_an_arrival_waits_for_no_more_than_the_backward_call_under_way(call, harness, make, oracle):
    whole = _trained(harness(), make)
    h, prompt, mailbox = harness(), make.prompt(20), []
    h.has_arrivals = lambda: bool(mailbox)
    calls = _count_backward_calls(h, lambda number: mailbox.append("r") if number == call else None)
    h.start_job("job", make.dataset(LENGTHS), make.spec())
    h.run(until=lambda: mailbox)
    assert len(h.plans[-1].backward) > call, "the plan was no longer than the call: the test shows nothing"
    assert len(calls) == call
    h.generate(mailbox.pop(), prompt, max_tokens=6)
    h.step()
    assert h.prefilled("r") == [(0, 20)]
    assert len(h.tokens("r")) == 1
    h.run()
    assert h.tokens("r") == oracle.greedy(prompt, 6)
    assert h.losses("job") == pytest.approx(whole.losses("job"), abs=1e-4)


def test_finetuning_moves_on_however_fast_messages_arrive(harness, make):
    h = harness(has_arrivals=lambda: True)
    calls = _count_backward_calls(h)
    for job_id in ("one", "two"):
        h.start_job(job_id, make.dataset(LENGTHS), make.spec(), tenant=job_id)
    h.run()
    assert len(h.losses("one")) == len(h.losses("two")) == 5
    assert len(calls) == sum(1 for plan in h.plans if plan.backward)


def test_in_a_pipeline_a_plan_runs_to_its_end(harness, make):
    whole = _trained(harness(pipeline_depth=1), make)
    h = _trained(harness(pipeline_depth=1, has_arrivals=lambda: True), make)
    assert len(h.plans) == pytest.approx(len(whole.plans), abs=2)
    assert _num_slices(h) == sum(len(plan.backward) for plan in h.plans)
    assert h.losses("job") == whole.losses("job")
