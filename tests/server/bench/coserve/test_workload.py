"""The requests of a window are a function of its description."""

from __future__ import annotations

import gzip
from pathlib import Path
from statistics import median

import pytest

from weft_scheduler.simulator.readers import TraceError
from weft_server.bench.coserve.workload import make_requests


def test_every_process_makes_the_same_requests(workload):
    assert make_requests(workload()) == make_requests(workload())
    assert make_requests(workload()) != make_requests(workload(seed=1))


def test_without_a_trace_lengths_and_rate_are_the_published_ones(workload):
    drawn = make_requests(workload(50.0, 100.0, length_scale=1.0, max_model_len=100_000))
    assert len(drawn) == pytest.approx(5000, rel=0.05)
    assert median(len(request.prompt) for request in drawn) == pytest.approx(1020, rel=0.1)
    assert median(request.num_output_tokens for request in drawn) == pytest.approx(129, rel=0.1)
    assert {request.adapter_idx for request in drawn} == {0, 1, 2}


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Azure's format: pairs of requests at a time, every two seconds."""
    rows = [
        f"2023-11-16 18:{2 * (i // 2) // 60:02d}:{2 * (i // 2) % 60:02d}.0000000,{100 + i},{1 + i % 7}"
        for i in range(400)
    ]
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]).encode()))
    return str(path)


def test_a_trace_keeps_its_bursts_at_the_wanted_rate(workload, trace):
    requests = make_requests(workload(8.0, 2.0, trace=trace, length_scale=1.0, max_model_len=1000))
    arrivals = [request.arrival_s for request in requests]
    assert len(requests) == 16
    assert arrivals == pytest.approx([0.25 * (i // 2) for i in range(16)])
    assert [len(request.prompt) for request in requests] == [400 + i for i in range(16)]


def test_a_trace_that_is_too_short_is_refused(workload, trace):
    with pytest.raises(TraceError, match="it has 400"):
        make_requests(workload(100.0, 2.0, trace=trace))


def test_requests_fit_the_context(workload):
    requests = make_requests(workload(100.0, 2.0, length_scale=1.0, max_model_len=64))
    assert max(len(request.prompt) + request.num_output_tokens for request in requests) <= 64
