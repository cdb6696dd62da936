"""Sampling on the device from counter-based random numbers.

Every draw is a function of (request seed, choice index, token position) and of that row's logits alone, so a
request's text never depends on its neighbours in the batch and is redrawn identically after a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft_kernels.sampling import draw
from weft_kernels.transfer import upload, upload_indices
from weft_server.engine.history import TokenHistory
from weft_server.protocol import SamplingParams

_MASK64 = (1 << 64) - 1
_LEAST_TEMPERATURE = 1e-30


@dataclass(slots=True)
class SamplingRow:
    """One row to sample: its parameters, its place in its sequence, the number of tokens generated before it,
    and what penalties look at (None without them)."""

    params: SamplingParams
    choice_idx: int
    position: int
    num_output: int
    history: TokenHistory | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """Result for `S` rows, on the device: `token_ids` `[S]` int64, and `finite` `[S]` bool (the row's logits
    were)."""

    token_ids: Tensor
    finite: Tensor


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Sampled:
    """Draw one token per row of `[S, vocab]` logits (not modified)."""
    scores = logits.float()
    finite = torch.isfinite(scores.amax(dim=-1))
    if any(_needs_processing(row) for row in rows):
        scores = _process(scores.clone() if scores is logits else scores, rows)
    greedy = scores.argmax(dim=-1)
    if all(row.params.temperature == 0 for row in rows):
        return Sampled(greedy, finite)
    drawn = _draw(scores, rows)
    is_greedy = upload([row.params.temperature == 0 for row in rows], torch.bool, logits.device)
    return Sampled(torch.where(is_greedy, greedy, drawn), finite)


def uniform(seed: int, choice_idx: int, position: int) -> float:
    """A number in [0, 1) from a 64-bit mix (splitmix64, Steele et al. 2014) of the three counters."""
    state = seed & _MASK64
    for word in (choice_idx, position):
        state = _splitmix64(state ^ _splitmix64(word & _MASK64))
    return (state >> 11) * 2.0**-53


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _needs_processing(row: SamplingRow) -> bool:
    return bool(row.history is not None or row.params.logit_bias or row.num_output < row.params.min_tokens)


def _process(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Penalties (with vLLM's and OpenAI's definitions), bias and minimum length, in place, row by row."""
    device = scores.device
    for row, score in zip(rows, scores, strict=True):
        params = row.params
        if row.history is not None:
            _penalize(score, params, row.history)
        if params.logit_bias:
            ids = upload_indices(list(params.logit_bias), device)
            score[ids] += upload(list(params.logit_bias.values()), torch.float32, device)
        if row.num_output < params.min_tokens and params.stop_token_ids:
            score.index_fill_(0, upload_indices(params.stop_token_ids, device), -torch.inf)
    return scores


def _penalize(score: Tensor, params: SamplingParams, history: TokenHistory) -> None:
    if history.seen is not None:
        factor = params.repetition_penalty
        penalized = torch.where(score > 0, score / factor, score * factor)
        score.copy_(torch.where(history.seen, penalized, score))
    if history.counts is not None:
        counts = history.counts
        score -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Inverse-CDF sampling in token-id order, so that filters of other rows cannot change a row's mapping."""
    device = scores.device
    temperatures = [max(row.params.temperature, _LEAST_TEMPERATURE) for row in rows]
    temperature = upload(temperatures, torch.float32, device)
    # Relative to the best token, so that no temperature is too low to divide by.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature.unsqueeze(1)
    if any(row.params.min_p > 0 for row in rows):
        min_p = upload([row.params.min_p for row in rows], torch.float32, device).unsqueeze(1)
        floor = scores.amax(dim=-1, keepdim=True) + torch.log(min_p)  # log 0 = -inf keeps all
        scores = scores.masked_fill(scores < floor, -torch.inf)
    if any(row.params.top_k is not None or row.params.top_p < 1 for row in rows):
        scores = _filter_top(scores, rows)
    uniforms = [uniform(row.params.seed, row.choice_idx, row.position) for row in rows]
    return draw(scores, upload(uniforms, torch.float64, device))


def _filter_top(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Keep the `top_k` most likely tokens, then the smallest set of them whose probability reaches
    `top_p`."""
    vocab_size, device = scores.shape[-1], scores.device
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    top_k = upload_indices([min(row.params.top_k or vocab_size, vocab_size) for row in rows], device)
    ranks = torch.arange(vocab_size, device=device).unsqueeze(0)
    ordered = ordered.masked_fill(ranks >= top_k.unsqueeze(1), -torch.inf)
    probabilities = torch.softmax(ordered, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # Without a limit of its own a row keeps all: rounding may carry its cumulated probability past 1.
    limits = [row.params.top_p if row.params.top_p < 1 else torch.inf for row in rows]
    top_p = upload(limits, torch.float32, device).unsqueeze(1)
    ordered = ordered.masked_fill((before >= top_p) & (ranks > 0), -torch.inf)
    return torch.empty_like(scores).scatter_(1, order, ordered)
