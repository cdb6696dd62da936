"""Traces as values: who asks when for how much, and what may be done to a trace before it is replayed.

Every transformation returns a new trace and is a pure function of its arguments (draws come from a seed).
Knows no file formats and no scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from random import Random
from typing import TypeAlias

POPULARITY_SLOPE = -0.91
"""Log-log slope of the uses of adapters over their rank in production (874 adapters; the first 200)."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: `arrival_s` after the start of the trace, tokens of its prompt and of its answer.

    `adapter` is None for the base model. `prefix_hashes` name the prompt's leading blocks of
    `prefix_block_tokens` tokens: requests that share the first n hashes share that many blocks.
    """

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    tenant: str = "default"
    adapter: str | None = None
    prefix_hashes: tuple[int, ...] = ()
    prefix_block_tokens: int = 512


Trace: TypeAlias = tuple[TraceRequest, ...]
"""Requests in order of arrival; the first arrives at 0 or later."""


def mean_rate(trace: Trace) -> float:
    """Requests a second, from the first arrival to the last; 1 for a single moment."""
    span_s = trace[-1].arrival_s - trace[0].arrival_s if trace else 0.0
    return (len(trace) - 1) / span_s if span_s > 0.0 else 1.0


def clip_duration(trace: Trace, duration_s: float, start_s: float = 0.0) -> Trace:
    """The requests of `[start_s, start_s + duration_s)`, moved so that `start_s` becomes 0."""
    end_s = start_s + duration_s
    return tuple(
        replace(request, arrival_s=request.arrival_s - start_s)
        for request in trace
        if start_s <= request.arrival_s < end_s
    )


def scale_rate(trace: Trace, factor: float) -> Trace:
    """The same requests, `factor` times as many a second.

    Raises:
        ValueError: the factor is not positive.
    """
    if factor <= 0.0:
        raise ValueError(f"the rate factor is {factor}; it must be positive")
    return tuple(replace(request, arrival_s=request.arrival_s / factor) for request in trace)


def scale_lengths(trace: Trace, factor: float) -> Trace:
    """Prompts and answers `factor` times as long, each at least one token. Shared prefixes are cut with it.

    Raises:
        ValueError: the factor is not positive.
    """
    if factor <= 0.0:
        raise ValueError(f"the length factor is {factor}; it must be positive")
    return tuple(
        replace(
            request,
            num_prompt_tokens=max(1, round(request.num_prompt_tokens * factor)),
            num_output_tokens=max(1, round(request.num_output_tokens * factor)),
            prefix_block_tokens=max(1, round(request.prefix_block_tokens * factor)),
        )
        for request in trace
    )


def fit_context(trace: Trace, max_model_len: int) -> Trace:
    """Cut what does not fit the model's context: answers to half of it, then prompts to what is left.

    Raises:
        ValueError: the context has no room for a prompt and an answer.
    """
    if max_model_len < 2:
        raise ValueError(f"the context is {max_model_len} tokens; at least 2 are needed")
    return tuple(_fitted(request, max_model_len) for request in trace)


def _fitted(request: TraceRequest, max_model_len: int) -> TraceRequest:
    if request.num_prompt_tokens + request.num_output_tokens <= max_model_len:
        return request
    num_output = min(request.num_output_tokens, max_model_len // 2)
    num_prompt = min(request.num_prompt_tokens, max_model_len - num_output)
    num_hashes = num_prompt // request.prefix_block_tokens
    return replace(
        request,
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
        prefix_hashes=request.prefix_hashes[:num_hashes],
    )


def spread_over_tenants(trace: Trace, num_tenants: int, seed: int) -> Trace:
    """Draw every request's tenant, `tenant-00`, `tenant-01`, …, all equally likely.

    Raises:
        ValueError: there is no tenant.
    """
    if num_tenants < 1:
        raise ValueError(f"the number of tenants is {num_tenants}; it must be at least 1")
    random = Random(f"tenants/{seed}")
    return tuple(replace(request, tenant=tenant_name(random.randrange(num_tenants))) for request in trace)


def tenant_name(idx: int) -> str:
    """The name of the tenant of an index."""
    return f"tenant-{idx:02d}"


def spread_over_adapters(
    trace: Trace, num_adapters: int, seed: int, slope: float = POPULARITY_SLOPE
) -> Trace:
    """Draw every request's adapter by a power law; adapter k belongs to the tenant whose turn it is.

    With A adapters and N tenants, tenant i owns adapters i, i + N, i + 2N, …, and draws among its own (any
    of them where it owns none). 0 adapters leaves everything on the base model.
    """
    if num_adapters == 0:
        return tuple(replace(request, adapter=None) for request in trace)
    tenants = sorted({request.tenant for request in trace})
    random = Random(f"adapters/{seed}")
    draw = {
        tenant: _power_law(range(idx, num_adapters, len(tenants)) or range(num_adapters), slope, random)
        for idx, tenant in enumerate(tenants)
    }
    return tuple(replace(request, adapter=f"adapter-{draw[request.tenant]():05d}") for request in trace)


def _power_law(ranks: Sequence[int], slope: float, random: Random) -> Callable[[], int]:
    """A function that draws an index, `(index + 1) ** slope` times as likely as index 0."""
    cumulative = list(accumulate((rank + 1) ** slope for rank in ranks))

    def draw() -> int:
        return random.choices(ranks, cum_weights=cumulative)[0]

    return draw


def split_over_replicas(trace: Trace, num_replicas: int) -> list[Trace]:
    """Deal the requests to identical replicas: by adapter where they name one (so that each adapter lives on
    one replica), else in turn.
    """
    home: dict[str, int] = {}
    parts: list[list[TraceRequest]] = [[] for _ in range(num_replicas)]
    load = [0] * num_replicas
    for request in trace:
        if request.adapter is None:
            replica = load.index(min(load))
        else:
            replica = home.setdefault(request.adapter, load.index(min(load)))
        load[replica] += request.num_prompt_tokens + 2 * request.num_output_tokens
        parts[replica].append(request)
    return [tuple(part) for part in parts]
