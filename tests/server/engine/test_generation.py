"""What engines answer, and with which log-probabilities, whatever else is in their batches."""

from __future__ import annotations

import pytest
import torch

RANKS = {"small": 2, "middle": 8, "large": 33}


def _assert_logprobs(deltas, prompt, expected_logits, num_top):
    expected = torch.log_softmax(expected_logits, dim=-1)
    entries = [entry for delta in deltas for entry in delta.logprobs]
    for position, entry in enumerate(entries, start=len(prompt) - 1):
        assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)
        values, ids = expected[position].topk(num_top)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_mixed_adapters_and_ranks_in_one_batch_answer_as_each_would_alone(harness, make, oracle):
    h = harness(max_batch_tokens=24)
    adapters = {name: make.adapter(seed, rank) for seed, (name, rank) in enumerate(RANKS.items())}
    adapters["query-value"] = make.adapter(9, 16, ("q_proj", "v_proj"))
    cases = [
        (f"{name}-{i}", adapter, make.prompt(7 + 9 * i, i))
        for i in (0, 2)
        for name, adapter in [("base", None), *adapters.items()]
    ]
    for request_id, adapter, prompt in cases:
        ref = None if adapter is None else h.store(adapter)
        h.generate(request_id, prompt, adapter=ref, max_tokens=10, logprobs=3)
    h.run()
    together = max(len({s.adapter_slot for s in plan.forward}) for plan in h.plans)
    assert together == len(adapters) + 1, "the batch was never mixed"
    for request_id, adapter, prompt in cases:
        assert h.tokens(request_id) == oracle.greedy(prompt, 10, adapter), request_id
        assert h.finish_reason(request_id) == "length"
        logits = oracle.logits(prompt + h.tokens(request_id), adapter)
        _assert_logprobs(h.deltas[request_id], prompt, logits, 3)


@pytest.mark.parametrize("max_batch_tokens", [10, 17, 64])
def test_prompt_logprobs_are_those_of_the_whole_prompt(max_batch_tokens, harness, make, oracle):
    h = harness(max_batch_tokens=max_batch_tokens, max_train_tokens=0, max_num_seqs=4)
    adapter = make.adapter(1)
    prompts = {
        "fills the context": make.prompt(160, 2),
        "a": make.prompt(50),
        "b": make.prompt(1),
        "c": make.prompt(23, 5),
    }
    for request_id, prompt in prompts.items():
        h.generate(request_id, prompt, adapter=h.store(adapter), prompt_logprobs=2, max_tokens=3)
    h.run()
    for request_id, prompt in prompts.items():
        first, *rest = h.deltas[request_id]
        assert all(delta.prompt_logprobs is None for delta in rest)
        assert first.prompt_logprobs[0] is None
        assert len(first.prompt_logprobs) == len(prompt)
        expected = torch.log_softmax(oracle.logits(prompt, adapter), dim=-1)
        for position, entry in enumerate(first.prompt_logprobs[1:]):
            assert entry.token_id == prompt[position + 1]
            assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)
            assert [i for i, _ in entry.top] == expected[position].topk(2).indices.tolist()


def test_a_stop_token_ends_the_answer_and_is_part_of_it(harness, make, oracle):
    prompt = make.prompt(9)
    expected = oracle.greedy(prompt, 12)
    stop = expected[5]
    h = harness()
    h.generate("stopped", prompt, stop_token_ids=(stop,))
    h.generate("other", make.prompt(8, 1), max_tokens=12)
    h.run()
    assert h.tokens("stopped") == expected[: expected.index(stop) + 1]
    assert h.finish_reason("stopped") == "stop"
    assert h.finish_reason("other") == "length"


def test_an_answer_resumed_after_a_crash_goes_on_as_it_would_have(harness, make):
    prompt = make.prompt(9)
    sampling = {"temperature": 1.0, "seed": 5, "max_tokens": 14, "presence_penalty": 0.7, "min_tokens": 4}
    h = harness()
    h.generate("whole", prompt, stop_token_ids=(3,), **sampling)
    h.run()
    whole = h.tokens("whole")
    for num_sent in (1, 6):
        resumed = harness()
        resumed.generate("rest", prompt, generated=whole[:num_sent], stop_token_ids=(3,), **sampling)
        resumed.run()
        assert whole[:num_sent] + resumed.tokens("rest") == whole
        assert resumed.finish_reason("rest") == h.finish_reason("whole")


def test_a_request_beyond_the_context_fails_alone_and_says_so(harness, make):
    h = harness(max_model_len=40)
    h.generate("long", make.prompt(41))
    h.generate("short", make.prompt(5))
    h.run()
    failure = h.failures()["long"]
    assert (failure.status, failure.code) == (400, "context_length_exceeded")
    assert "41 tokens" in failure.message
    assert len(h.tokens("short")) == 12


def test_the_context_cuts_an_answer_short(harness, make, oracle):
    h = harness(max_model_len=40)
    prompt = make.prompt(34)
    h.generate("a", prompt, max_tokens=100)
    h.run()
    assert h.tokens("a") == oracle.greedy(prompt, 6)
    assert h.finish_reason("a") == "length"


@pytest.mark.parametrize(
    ("prompt", "more"),
    [
        ([1, 61, 2], {}),
        ([1, -1, 2], {}),
        ([1, 2], {"generated": [61]}),
        ([1, 2], {"stop_token_ids": (3, 61), "min_tokens": 2}),
        ([1, 2], {"logit_bias": {61: 5.0}}),
    ],
)
def test_a_token_outside_the_vocabulary_is_refused_beside_others_that_go_on(
    prompt, more, harness, make, oracle
):
    h = harness()
    other = make.prompt(9)
    h.generate("other", other, max_tokens=4)
    h.generate("bad", prompt, **more)
    h.run()
    failure = h.failures()["bad"]
    assert (failure.status, failure.code) == (400, "invalid_request")
    stranger = -1 if -1 in prompt else 61
    assert f"token id {stranger}" in failure.message
    assert "61 tokens" in failure.message
    assert h.tokens("other") == oracle.greedy(other, 4)
