"""The requests of a window: arrival times and lengths from a trace, tokens and adapters from a seed.

A pure function of its description, so that every contender, in whatever process, gets the same requests. A
trace's bursts stay, its rate becomes the wanted one: as many consecutive requests as that takes are stretched
over the window.
Without a trace, arrivals are Poisson and lengths log-normal with the published median and 99th percentile of
Azure's conversations of 2023.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

from weft_scheduler.simulator.readers import TraceError, read_trace
from weft_scheduler.simulator.trace import (
    Trace,
    TraceRequest,
    fit_context,
    scale_lengths,
    spread_over_adapters,
)
from weft_server.errors import ConfigError

_PROMPT_P50, _PROMPT_P99 = 1020.0, 4142.0
_OUTPUT_P50, _OUTPUT_P99 = 129.0, 601.0
_Z99 = 2.3263
_MAX_REQUESTS = 100_000
_WARM_REQUESTS = 300
"""Requests at the beginning of a trace that are left out: Azure's first minute is quieter than the rest."""


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What the requests of one window are made from.

    `requests_per_s` is the mean rate, `seconds` the time of arrivals; prompts and answers are `length_scale`
    times as long as the trace's and cut to `max_model_len`. `trace` is a path as `read_trace` takes it.
    """

    requests_per_s: float
    seconds: float
    vocab_size: int
    max_model_len: int
    num_adapters: int
    length_scale: float = 1.0
    trace: str | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request: it arrives `arrival_s` after the window began and is answered with exactly
    `num_output_tokens` tokens, by adapter number `adapter_idx`.
    """

    request_id: str
    arrival_s: float
    prompt: tuple[int, ...]
    num_output_tokens: int
    adapter_idx: int


def check_load(flag: str, requests_per_s: float, seconds: float) -> None:
    """Refuse a load that one process could neither prepare nor send.

    Raises:
        ConfigError: too many requests for a window.
    """
    if requests_per_s * seconds > _MAX_REQUESTS:
        raise ConfigError(
            f"{flag} {requests_per_s:g} for {seconds:g} s would be {requests_per_s * seconds:.0f} requests; "
            f"at most {_MAX_REQUESTS} can be sent"
        )


def make_requests(spec: WorkloadSpec) -> tuple[BenchRequest, ...]:
    """The requests of a window, in order of arrival.

    Raises:
        TraceError: the trace cannot be read.
    """
    trace = arrivals(spec)
    trace = fit_context(scale_lengths(trace, spec.length_scale), spec.max_model_len)
    trace = spread_over_adapters(trace, spec.num_adapters, spec.seed)
    random = Random(f"prompts/{spec.seed}")
    return tuple(
        BenchRequest(
            request_id=f"request-{idx:05d}",
            arrival_s=request.arrival_s,
            prompt=tuple(random.randrange(spec.vocab_size) for _ in range(request.num_prompt_tokens)),
            num_output_tokens=request.num_output_tokens,
            adapter_idx=0 if request.adapter is None else int(request.adapter.rpartition("-")[2]),
        )
        for idx, request in enumerate(trace)
    )


def arrivals(spec: WorkloadSpec) -> Trace:
    """When requests arrive, and lengths, before either is fitted to the model.

    Raises:
        TraceError: the trace cannot be read, or is too short.
    """
    if spec.trace is None:
        return draw_trace(spec.requests_per_s, spec.seconds, spec.seed)
    return _stretch(read_trace(spec.trace, seed=spec.seed), spec)


def _stretch(trace: Trace, spec: WorkloadSpec) -> Trace:
    """As many requests of the trace, one after the other, as the rate asks for, stretched over the window.

    Raises:
        TraceError: the trace has fewer.
    """
    count = max(1, round(spec.requests_per_s * spec.seconds))
    part = trace[_WARM_REQUESTS : _WARM_REQUESTS + count + 1]
    if len(part) <= count:
        raise TraceError(
            f"trace {spec.trace}: {_WARM_REQUESTS + count + 1} requests are needed for "
            f"{spec.requests_per_s:g}/s in {spec.seconds:g} s; it has {len(trace)}"
        )
    first_s = part[0].arrival_s
    factor = spec.seconds / max(part[-1].arrival_s - first_s, 1e-9)
    return tuple(replace(request, arrival_s=(request.arrival_s - first_s) * factor) for request in part[:-1])


def draw_trace(requests_per_s: float, seconds: float, seed: int) -> Trace:
    """Poisson arrivals, and lengths like those of Azure's conversations."""
    random, now_s = Random(f"arrivals/{seed}"), 0.0
    requests: list[TraceRequest] = []
    while True:
        now_s += random.expovariate(1.0) / requests_per_s
        prompt = _log_normal(random, _PROMPT_P50, _PROMPT_P99)
        output = _log_normal(random, _OUTPUT_P50, _OUTPUT_P99)
        if now_s >= seconds:
            return tuple(requests)
        requests.append(TraceRequest(now_s, prompt, output))


def _log_normal(random: Random, p50: float, p99: float) -> int:
    sigma = math.log(p99 / p50) / _Z99
    return max(1, round(random.lognormvariate(math.log(p50), sigma)))
