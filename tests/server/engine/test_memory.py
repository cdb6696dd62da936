"""Memory pressure, aborts and pipelining change when tokens are computed, never which."""

from __future__ import annotations

import pytest

SAMPLED = {"temperature": 1.0, "seed": 17, "top_p": 0.95, "repetition_penalty": 1.2}


def _requests(make, num_requests=6):
    return {f"r{i}": (make.prompt(6 + 5 * i, i), {} if i % 2 else SAMPLED) for i in range(num_requests)}


def _answers(h, requests, max_tokens=24, **sampling):
    for request_id, (prompt, own) in requests.items():
        h.generate(request_id, prompt, max_tokens=max_tokens, **(own | sampling))
    h.run()
    assert not h.failures()
    return {request_id: h.tokens(request_id) for request_id in requests}


def test_preempted_requests_give_the_same_text_greedy_and_sampled(harness, make):
    requests = _requests(make)
    roomy, tiny = harness(), harness(num_blocks=26, max_model_len=100)
    expected = _answers(roomy, requests)
    assert _answers(tiny, requests) == expected
    assert tiny.scheduler.num_preemptions > 0 == roomy.scheduler.num_preemptions
    assert tiny.scheduler.kv_usage == 0


def test_log_probabilities_survive_preemption(harness, make):
    requests = _requests(make)
    roomy, tiny = harness(), harness(num_blocks=26, max_model_len=100)
    for h in (roomy, tiny):
        _answers(h, requests, logprobs=2, prompt_logprobs=1)
    assert tiny.scheduler.num_preemptions > 0
    for request_id, (prompt, _) in requests.items():
        expected = [entry for delta in roomy.deltas[request_id] for entry in delta.logprobs]
        actual = [entry for delta in tiny.deltas[request_id] for entry in delta.logprobs]
        assert [e.token_id for e in actual] == [e.token_id for e in expected]
        assert [e.logprob for e in actual] == pytest.approx([e.logprob for e in expected], abs=1e-4)
        first = tiny.deltas[request_id][0].prompt_logprobs
        assert len(first) == len(prompt)
        for entry, other in zip(first[1:], roomy.deltas[request_id][0].prompt_logprobs[1:], strict=True):
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_preempted_requests_leave_their_device_rows_to_others(harness, make):
    h = harness(max_num_seqs=2, num_blocks=16, max_model_len=60, max_batch_tokens=32)
    for i in range(8):
        h.generate(f"r{i}", make.prompt(14, i), max_tokens=30, tenant=f"tenant-{i}")
    h.run()
    assert h.scheduler.num_preemptions > 0
    assert all(len(h.tokens(f"r{i}")) == 30 for i in range(8))


def test_aborting_frees_everything(harness, make):
    h = harness()
    adapter = h.store(make.adapter(1))
    for i in range(12):
        h.generate(f"r{i}", make.prompt(30, i), adapter=adapter if i % 2 else None, max_tokens=100)
    h.run(until=lambda: all(len(h.tokens(f"r{i}")) > 3 for i in range(4)))
    assert h.scheduler.kv_usage > 0
    for i in range(12):
        h.abort(f"r{i}")
        h.abort(f"r{i}")
    h.abort("never heard of")
    told = dict(h.deltas)
    h.run()
    assert h.deltas == told, "something was sent after the abort"
    assert h.scheduler.kv_usage == 0
    assert h.scheduler.num_running == h.scheduler.num_waiting == 0
    assert all(h.runner.sequence(f"r{i}") is None for i in range(12))
    h.generate("after", make.prompt(30), max_tokens=3)
    h.run()
    assert len(h.tokens("after")) == 3


def test_a_pipelined_engine_gives_the_same_tokens(harness, make, oracle):
    prompt = make.prompt(9)
    stop = oracle.greedy(prompt, 12)[7]
    adapter = make.adapter(2)
    everything = {}
    for depth in (0, 1):
        h = harness(pipeline_depth=depth)
        ref = h.store(adapter)
        h.generate("greedy", prompt, adapter=ref)
        h.generate("stopped", prompt, stop_token_ids=(stop,))
        h.generate("sampled", make.prompt(20, 1), temperature=0.8, seed=3, max_tokens=30)
        h.generate(
            "penalized",
            make.prompt(5, 2),
            temperature=1.0,
            seed=4,
            max_tokens=30,
            presence_penalty=0.9,
            frequency_penalty=0.4,
            repetition_penalty=1.3,
        )
        h.generate(
            "penalized and stopped", prompt, stop_token_ids=(stop,), frequency_penalty=0.01, max_tokens=40
        )
        h.generate("at least", prompt, stop_token_ids=(stop,), min_tokens=10, max_tokens=40)
        h.generate("one", make.prompt(3), max_tokens=1, logprobs=1, prompt_logprobs=1)
        for i in range(6):
            h.generate(f"more {i}", make.prompt(11 + i, i), max_tokens=3 + 4 * i)
        h.run()
        assert not h.failures()
        assert h.scheduler.kv_usage == 0
        everything[depth] = {request_id: h.tokens(request_id) for request_id in h.deltas}
    assert everything[1] == everything[0]
    assert everything[1]["stopped"][-1] == stop


def test_a_pipelined_engine_has_two_plans_in_flight(harness, make):
    h = harness(pipeline_depth=1)
    h.generate("a", make.prompt(4), max_tokens=8)
    most = 0
    for _ in range(30):
        h.step()
        most = max(most, len(h.plans) - len(h.tokens("a")))
    assert len(h.tokens("a")) == 8
    assert most == 1, "the plan after the one that runs is submitted before that one is committed"


def test_aborts_in_a_pipelined_engine_disturb_nobody(harness, make, oracle):
    h = harness(pipeline_depth=1, max_num_seqs=3)
    prompts = {f"r{i}": make.prompt(10, i) for i in range(9)}
    for request_id, prompt in prompts.items():
        h.generate(request_id, prompt, max_tokens=20, presence_penalty=0.001)
    for number in h.steps():
        if number % 5 == 4:
            h.abort(f"r{number // 5 * 2}")
        if not h.engine.has_work:
            break
    h.scheduler.check_invariants()
    assert h.scheduler.kv_usage == 0
    finished = [request_id for request_id in prompts if h.finish_reason(request_id)]
    assert len(finished) >= 4
    alone = harness()
    for request_id in finished:
        alone.generate(request_id, prompts[request_id], max_tokens=20, presence_penalty=0.001)
    alone.run()
    for request_id in finished:
        assert h.tokens(request_id) == alone.tokens(request_id)


def test_a_pipelined_engine_under_pressure_gives_the_same_text(harness, make):
    requests = _requests(make)
    expected = _answers(harness(), requests)
    tiny = harness(pipeline_depth=1, num_blocks=26, max_model_len=100)
    assert _answers(tiny, requests) == expected
    assert tiny.scheduler.num_preemptions > 0
