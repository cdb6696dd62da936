"""Transformations of traces: rates, lengths, tenants, adapters, replicas."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from weft_scheduler.simulator.trace import (
    Trace,
    TraceRequest,
    clip_duration,
    fit_context,
    mean_rate,
    scale_lengths,
    scale_rate,
    split_over_replicas,
    spread_over_adapters,
    spread_over_tenants,
)


def trace_of(num: int) -> Trace:
    return tuple(TraceRequest(float(idx), 100, 50) for idx in range(num))


def test_a_scaled_rate_keeps_the_requests() -> None:
    scaled = scale_rate(trace_of(11), 4.0)
    assert (len(scaled), mean_rate(scaled)) == (11, 4.0)


def test_a_clipped_window_begins_at_zero() -> None:
    assert [r.arrival_s for r in clip_duration(trace_of(10), 3.0, 2.0)] == [0.0, 1.0, 2.0]


def test_lengths_scale_together_with_their_prefix_blocks() -> None:
    (scaled,) = scale_lengths((TraceRequest(0.0, 1024, 3, prefix_hashes=(1, 2)),), 0.25)
    assert (scaled.num_prompt_tokens, scaled.num_output_tokens, scaled.prefix_block_tokens) == (256, 1, 128)


def test_what_exceeds_the_context_is_cut_to_it() -> None:
    trace = (TraceRequest(0.0, 5000, 900, prefix_hashes=tuple(range(9))), TraceRequest(1.0, 10, 10))
    cut, kept = fit_context(trace, 1000)
    assert (cut.num_prompt_tokens, cut.num_output_tokens, cut.prefix_hashes) == (500, 500, ())
    assert kept == trace[1]


@pytest.mark.parametrize("function", [scale_rate, scale_lengths])
def test_a_factor_must_be_positive(function: object) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        function(trace_of(1), 0.0)  # type: ignore[operator]


def test_tenants_are_drawn_evenly_and_from_the_seed() -> None:
    trace = spread_over_tenants(trace_of(6000), 6, seed=1)
    counts = Counter(request.tenant for request in trace)
    assert len(counts) == 6
    assert min(counts.values()) > 850
    assert trace == spread_over_tenants(trace_of(6000), 6, seed=1)
    assert trace != spread_over_tenants(trace_of(6000), 6, seed=2)


def test_adapters_follow_the_power_law() -> None:
    trace = spread_over_adapters(trace_of(40_000), 874, seed=0)
    uses = [count for _, count in Counter(r.adapter for r in trace).most_common()]
    slope = math.log(uses[99] / uses[3]) / math.log(100 / 4)
    assert slope == pytest.approx(-0.91, abs=0.08)
    assert uses[0] / 40_000 == pytest.approx(0.079, abs=0.03)


def test_tenants_own_different_adapters() -> None:
    trace = spread_over_adapters(spread_over_tenants(trace_of(2000), 4, seed=0), 40, seed=0)
    owners: dict[str | None, set[str]] = {}
    for request in trace:
        owners.setdefault(request.adapter, set()).add(request.tenant)
    assert all(len(tenants) == 1 for tenants in owners.values())


def test_no_adapters_leave_the_base_model() -> None:
    assert {request.adapter for request in spread_over_adapters(trace_of(5), 0, seed=0)} == {None}


def test_replicas_share_the_load_and_keep_adapters_together() -> None:
    trace = trace_of(90)
    assert [len(part) for part in split_over_replicas(trace, 3)] == [30, 30, 30]
    named = spread_over_adapters(trace, 12, seed=0)
    parts = split_over_replicas(named, 3)
    assert sorted((r for part in parts for r in part), key=lambda r: r.arrival_s) == list(named)
    homes = [adapter for part in parts for adapter in {request.adapter for request in part}]
    assert len(set(homes)) == len(homes)
