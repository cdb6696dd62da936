"""Who asks what when: a trace, scaled to the wanted rate and to the model's context, as HTTP bodies.

A pure function of the trace, the options and a seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from weft_scheduler.simulator.trace import (
    Trace,
    TraceRequest,
    fit_context,
    scale_lengths,
    spread_over_adapters,
    spread_over_tenants,
)

_LOWEST_ID, _HIGHEST_ID = 100, 500
"""Prompts are random token ids in between, which every tokenizer at hand has."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request to be sent `arrival_s` after the beginning, by the tenant of index `tenant_idx`."""

    arrival_s: float
    tenant_idx: int
    num_prompt_tokens: int
    num_output_tokens: int
    body: bytes


def shape_trace(
    trace: Trace, *, length_scale: float, max_model_len: int, num_tenants: int, num_adapters: int, seed: int
) -> Trace:
    """The trace with lengths that fit, spread over tenants (unless it names its own) and adapters."""
    trace = fit_context(scale_lengths(trace, length_scale), max_model_len)
    if len({request.tenant for request in trace}) == 1:
        trace = spread_over_tenants(trace, num_tenants, seed)
    return spread_over_adapters(trace, num_adapters, seed)


def make_requests(
    trace: Trace,
    *,
    models: Sequence[Sequence[str]],
    base_model: str,
    seed: int,
    extra: Mapping[str, object],
) -> tuple[LoadRequest, ...]:
    """Bodies of streamed completions of exactly the trace's lengths.

    Args:
        models: for each tenant, names of the adapters that it may ask for; the trace's tenants and adapters
            are dealt to them in turn.
        base_model: asked for where the trace names no adapter, or the tenant has none.
        extra: further fields of every body.
    """
    tenants = {name: idx for idx, name in enumerate(sorted({request.tenant for request in trace}))}
    random, prefixes = Random(f"prompts/{seed}"), _Prefixes(seed)
    requests = []
    for request in trace:
        tenant_idx = tenants[request.tenant] % len(models)
        body = {
            "model": _model(request, models[tenant_idx], base_model),
            "prompt": prefixes.prompt(request, random),
            "max_tokens": request.num_output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.0,
            **extra,
        }
        encoded = json.dumps(body, separators=(",", ":")).encode()
        requests.append(
            LoadRequest(
                request.arrival_s, tenant_idx, request.num_prompt_tokens, request.num_output_tokens, encoded
            )
        )
    return tuple(requests)


def _model(request: TraceRequest, adapters: Sequence[str], base_model: str) -> str:
    if request.adapter is None or not adapters:
        return base_model
    return adapters[int(request.adapter.rpartition("-")[2]) % len(adapters)]


class _Prefixes:
    """Token ids of prompts: blocks that the trace names by the same hash are the same."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def prompt(self, request: TraceRequest, random: Random) -> list[int]:
        tokens: list[int] = []
        for block in request.prefix_hashes:
            shared = Random(f"prefix/{self._seed}/{request.tenant}/{block}")
            tokens += _ids(shared, request.prefix_block_tokens)
        tokens = tokens[: request.num_prompt_tokens]
        return tokens + _ids(random, request.num_prompt_tokens - len(tokens))


def _ids(random: Random, count: int) -> list[int]:
    return [random.randrange(_LOWEST_ID, _HIGHEST_ID) for _ in range(count)]
