"""What a run amounts to, on replies made by hand; and what is sent."""

from __future__ import annotations

import json

import pytest

from weft_scheduler.simulator.trace import TraceRequest
from weft_server.bench.serve.client import Reply
from weft_server.bench.serve.load import Run, Sent
from weft_server.bench.serve.measures import Latencies, Slo, report_of
from weft_server.bench.serve.workload import LoadRequest, make_requests, shape_trace

SLO = Slo(tpot_ms=50.0, ttft_ms=1000.0)


def sent(due_s=10.0, lag_s=0.0, ttft_s=0.5, tpot_s=0.04, num_tokens=11, error=None):
    first = due_s + lag_s + ttft_s
    pieces = [] if error else [first, first + (num_tokens - 1) * tpot_s]
    reply = Reply(due_s + lag_s, first + 1.0, pieces, num_tokens, error)
    return Sent(LoadRequest(due_s - 10.0, 0, 7, num_tokens, b""), due_s, reply)


def test_times_count_from_when_a_request_was_due():
    latencies = Latencies.of(sent(lag_s=0.3))
    assert latencies is not None
    assert latencies.ttft_ms == pytest.approx(800.0)
    assert latencies.tpot_ms == pytest.approx(40.0)


def test_a_report_counts_goodput_errors_and_lateness():
    run = Run(
        (
            sent(),
            sent(tpot_s=0.2),
            sent(lag_s=0.6),
            sent(error="429 queue_full"),
            sent(error="429 queue_full"),
        ),
        began_s=10.0,
        seconds=20.0,
        client_cpu_s=1.0,
    )
    report = report_of(run, SLO)
    assert (report.num_requests, report.num_answered) == (5, 3)
    assert report.errors == {"429 queue_full": 2}
    assert report.attained == pytest.approx(0.2)
    assert report.goodput_per_s == pytest.approx(1 / 20)
    assert report.late == pytest.approx(0.2)
    assert report.generated_per_s == pytest.approx(33 / 20)
    assert report.client_cpu == pytest.approx(0.05)


def test_an_answer_without_tokens_is_an_error():
    empty = sent()
    empty.reply.pieces_s = []
    assert report_of(Run((empty,), 10.0, 1.0, 0.0), SLO).errors == {"empty answer": 1}


TRACE = tuple(
    TraceRequest(0.1 * i, 40, 5, prefix_hashes=(1, 2 + i % 2), prefix_block_tokens=16) for i in range(20)
)


def shaped(**changes):
    fields = {"length_scale": 1.0, "max_model_len": 64, "num_tenants": 2, "num_adapters": 4, "seed": 0}
    return shape_trace(TRACE, **{**fields, **changes})


def test_bodies_name_the_tenants_own_adapters_and_share_prefixes():
    models = [["a0", "a1"], ["b0"]]
    requests = make_requests(shaped(), models=models, base_model="base", seed=0, extra={"logprobs": 0})
    bodies = [json.loads(request.body) for request in requests]
    assert {request.tenant_idx for request in requests} == {0, 1}
    for request, body in zip(requests, bodies, strict=True):
        assert body["model"] in models[request.tenant_idx]
        assert len(body["prompt"]) == request.num_prompt_tokens == 40
        assert (body["max_tokens"], body["ignore_eos"], body["logprobs"]) == (5, True, 0)
    own = [body["prompt"] for request, body in zip(requests, bodies, strict=True) if request.tenant_idx == 0]
    assert len({tuple(prompt[:16]) for prompt in own}) == 1
    assert len({tuple(prompt) for prompt in own}) == len(own)


def test_lengths_fit_the_context_and_tenants_of_the_trace_stay():
    assert all(r.num_prompt_tokens + r.num_output_tokens <= 20 for r in shaped(max_model_len=20))
    own = tuple(TraceRequest(0.1 * i, 4, 5, tenant=f"client-{i % 3}") for i in range(9))
    kept = shape_trace(own, length_scale=1.0, max_model_len=64, num_tenants=2, num_adapters=0, seed=0)
    assert {request.tenant for request in kept} == {"client-0", "client-1", "client-2"}
    requests = make_requests(kept, models=[[], []], base_model="base", seed=0, extra={})
    assert {json.loads(request.body)["model"] for request in requests} == {"base"}
