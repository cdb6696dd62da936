"""The prefix cache changes what is computed, never what is answered, and nothing of one tenant or adapter
reaches another.
"""

from __future__ import annotations

import pytest
import torch

BOTH_DEPTHS = pytest.mark.parametrize("pipeline_depth", [0, 1])


def _in_turn(h, *request_ids, prompt, **options):
    for request_id in request_ids:
        h.generate(request_id, prompt, **options)
        h.run()
    assert not h.failures()


def _assert_logprobs(h, request_id, prompt, expected_logits):
    """Those of all generated tokens, from the first on, which follows the cached part."""
    expected = torch.log_softmax(expected_logits, dim=-1)
    entries = [entry for delta in h.deltas[request_id] for entry in delta.logprobs]
    for position, entry in enumerate(entries, start=len(prompt) - 1):
        assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)
        values, ids = expected[position].topk(3)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


@BOTH_DEPTHS
def test_answers_over_a_cached_prompt_are_those_of_the_model(pipeline_depth, harness, make, oracle):
    prompt = make.prompt(41)
    h = harness(pipeline_depth=pipeline_depth)
    _in_turn(h, "first", "second", prompt=prompt, logprobs=3)
    assert (h.num_cached("first"), h.num_cached("second")) == (0, 40)
    assert h.prefilled("second") == [(40, 1)]
    for request_id in ("first", "second"):
        assert h.tokens(request_id) == oracle.greedy(prompt, 12)
        _assert_logprobs(h, request_id, prompt, oracle.logits(prompt + h.tokens(request_id)))


@BOTH_DEPTHS
def test_a_conversation_finds_its_earlier_turns_questions_and_answers(pipeline_depth, harness, make, oracle):
    h, plain = (harness(pipeline_depth=pipeline_depth, prefix_cache=on) for on in (True, False))
    history = make.prompt(9)
    num_before = 0
    for turn in range(4):
        request_id = f"turn {turn}"
        for engine in (h, plain):
            engine.generate(request_id, history, max_tokens=10, logprobs=3)
            engine.run()
        assert h.tokens(request_id) == plain.tokens(request_id) == oracle.greedy(history, 10)
        _assert_logprobs(h, request_id, history, oracle.logits(history + h.tokens(request_id)))
        assert plain.prefilled(request_id)[0][0] == plain.num_cached(request_id) == 0
        if turn:
            # All of the turn before but its newest token, in whole blocks.
            assert h.prefilled(request_id)[0][0] == h.num_cached(request_id) == (num_before - 1) // 4 * 4
        num_before = len(history) + 10
        history = history + h.tokens(request_id) + make.prompt(7, turn)


def test_one_prompt_of_two_tenants_and_three_models_is_computed_for_each_and_answered_by_each(
    harness, make, oracle
):
    prompt = make.prompt(30)
    models = {"base": None, "red": make.adapter(1), "blue": make.adapter(2, rank=8)}
    h = harness()
    for round_ in range(2):
        for name, adapter in models.items():
            ref = None if adapter is None else h.store(adapter)
            for tenant in ("ada", "bob"):
                h.generate(f"{tenant} {name} {round_}", prompt, adapter=ref, tenant=tenant, logprobs=3)
        h.run()
    for name, adapter in models.items():
        expected = oracle.greedy(prompt, 12, adapter)
        for tenant in ("ada", "bob"):
            for round_, num_cached in enumerate((0, 28)):
                request_id = f"{tenant} {name} {round_}"
                assert h.num_cached(request_id) == num_cached, request_id
                assert h.prefilled(request_id)[0][0] == num_cached
                assert h.tokens(request_id) == expected, request_id
                logits = oracle.logits(prompt + expected, adapter)
                _assert_logprobs(h, request_id, prompt, logits)


def test_a_new_version_of_an_adapter_finds_nothing_of_the_one_before(harness, make, oracle):
    prompt = make.prompt(30)
    h = harness()
    versions = [make.adapter(seed) for seed in (1, 2)]
    for number, adapter in enumerate(versions):
        # As after a publish under the same name: the tenant is the same, only the digest is another.
        _in_turn(h, f"v{number}", f"v{number} again", prompt=prompt, adapter=h.store(adapter))
        assert h.num_cached(f"v{number}") == 0
        assert h.num_cached(f"v{number} again") == 28
        assert h.tokens(f"v{number} again") == oracle.greedy(prompt, 12, adapter)


@BOTH_DEPTHS
def test_the_prompt_of_four_choices_is_computed_once(pipeline_depth, harness, make):
    prompt = make.prompt(90)
    sampling = {"temperature": 1.0, "seed": 3, "max_tokens": 9}
    h, plain = (harness(pipeline_depth=pipeline_depth, prefix_cache=on) for on in (True, False))
    for engine in (h, plain):
        for idx in range(4):
            engine.generate(f"c{idx}", prompt, choice_idx=idx, **sampling)
        engine.run()
    num_computed = [sum(n for idx in range(4) for _, n in e.prefilled(f"c{idx}")) for e in (h, plain)]
    assert num_computed == [90 + 3 * 2, 4 * 90]
    assert [h.num_cached(f"c{idx}") for idx in range(4)] == [0, 88, 88, 88]
    for idx in range(4):
        assert h.tokens(f"c{idx}") == plain.tokens(f"c{idx}")
    assert len({tuple(h.tokens(f"c{idx}")) for idx in range(4)}) == 4
    counters = h.engine.heartbeat().counters
    assert (counters["prefix_cache_queries"], counters["prefix_cache_hits"]) == (360, 264)


@BOTH_DEPTHS
def test_preempted_requests_go_on_from_their_cached_blocks_with_the_same_text(pipeline_depth, harness, make):
    small = {"pipeline_depth": pipeline_depth, "num_blocks": 26, "max_model_len": 100}
    h, plain = (harness(prefix_cache=on, **small) for on in (True, False))
    for engine in (h, plain):
        for i in range(6):
            engine.generate(f"r{i}", make.prompt(6 + 5 * i, i), max_tokens=24)
        engine.run()
        assert engine.scheduler.num_preemptions > 0
        assert engine.scheduler.kv_usage == 0
    resumed = [start for i in range(6) for start, _ in h.prefilled(f"r{i}") if start > 0]
    assert resumed, "no preempted request found anything"
    for i in range(6):
        assert h.tokens(f"r{i}") == plain.tokens(f"r{i}")
        assert h.num_cached(f"r{i}") == 0


def test_log_probabilities_of_a_cached_prompt_are_computed_all_the_same(harness, make, oracle):
    prompt = make.prompt(30)
    h = harness()
    _in_turn(h, "first", prompt=prompt)
    _in_turn(h, "scored", prompt=prompt, prompt_logprobs=1)
    assert h.num_cached("scored") == 0
    expected = torch.log_softmax(oracle.logits(prompt), dim=-1)
    found = h.deltas["scored"][0].prompt_logprobs
    assert len(found) == 30
    for position, entry in enumerate(found[1:]):
        assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)


def test_an_answer_resumed_after_a_crash_may_find_its_prompt_and_says_nothing_of_it(harness, make):
    prompt = make.prompt(21)
    sampling = {"temperature": 1.0, "seed": 5, "max_tokens": 14}
    h = harness()
    _in_turn(h, "whole", prompt=prompt, **sampling)
    resumed = harness()
    _in_turn(resumed, "other", prompt=prompt, max_tokens=1)
    _in_turn(resumed, "rest", prompt=prompt, generated=h.tokens("whole")[:6], **sampling)
    assert resumed.prefilled("rest")[0][0] == 20
    assert resumed.num_cached("rest") is None
    assert h.tokens("whole")[:6] + resumed.tokens("rest") == h.tokens("whole")


def test_nothing_is_kept_of_a_request_that_produced_nan(harness, make):
    h = harness()
    ref = h.store(make.adapter(5, std=1e25))
    prompt = make.prompt(100)
    for request_id in ("first", "second"):
        h.generate(request_id, prompt, adapter=ref)
        h.run()
        assert h.failures()[request_id].code == "non_finite_logits"
        assert h.prefilled(request_id)[0] == (0, 64), "the prompt is computed in two chunks"
    assert len(h.scheduler._state.prefixes) == 0
    h.generate("good", prompt)
    h.run()
    assert len(h.tokens("good")) == 12


def test_switched_off_the_cache_keeps_and_finds_nothing(harness, make):
    h = harness(prefix_cache=False)
    _in_turn(h, "first", "second", prompt=make.prompt(30))
    assert h.num_cached("second") == 0
    counters = h.engine.heartbeat().counters
    assert counters["prefix_cache_queries"] == counters["prefix_cache_hits"] == 0
    assert len(h.scheduler._state.prefixes) == 0
