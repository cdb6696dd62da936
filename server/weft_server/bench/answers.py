"""The same generation from PEFT: a mixed batch, an adapter for each row, by `generate(adapter_names=…)`.

Owns what Weft's answers are compared with, in value and in time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft_server.bench.harness import Generation
from weft_server.bench.peers import PeerModel, adapter_name


class _Timestamps:
    """A stopping criterion that never stops and notes when each token was there."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, input_ids: Tensor, _scores: Tensor, **_kwargs: Any) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def peer_generate(
    peer: PeerModel, prompts: Sequence[Sequence[int]], adapters: Sequence[int | None], *, max_tokens: int
) -> Generation:
    """Greedy answers of exactly `max_tokens` tokens to prompts of one length, with a KV cache."""
    timestamps = _Timestamps()
    ids = torch.tensor(prompts, device=peer.device)
    started = time.perf_counter()
    answer = peer.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=[timestamps],
        **_adapter_names(peer, adapters),
    )
    tokens = answer[:, ids.shape[1] :].tolist()
    return Generation(
        tokens=tokens,
        logprobs=[],
        first_s=timestamps.seconds[0] - started,
        decode_s=timestamps.seconds[-1] - timestamps.seconds[0],
        num_decoded=len(prompts) * (max_tokens - 1),
    )


@torch.no_grad()
def peer_prefill(peer: PeerModel, prompts: Sequence[Sequence[int]], adapters: Sequence[int | None]) -> float:
    """Seconds until the first tokens of prompts of one length are on the host: one forward pass with a KV
    cache and the last position's logits only, which is less than `generate` does."""
    ids = torch.tensor(prompts, device=peer.device)
    started = time.perf_counter()
    output = peer(input_ids=ids, use_cache=True, logits_to_keep=1, **_adapter_names(peer, adapters))
    output.logits[:, -1].argmax(-1).tolist()
    return time.perf_counter() - started


@torch.no_grad()
def peer_logprobs(
    peer: PeerModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    adapters: Sequence[int | None],
) -> Tensor:
    """PEFT's log-probabilities `[requests, tokens]` of given answers, all positions in one forward pass."""
    ids = torch.tensor([[*p, *a] for p, a in zip(prompts, answers, strict=True)], device=peer.device)
    num_answered = len(answers[0])
    logits = peer(input_ids=ids, logits_to_keep=num_answered + 1, **_adapter_names(peer, adapters)).logits
    logs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    return logs.gather(2, ids[:, -num_answered:].unsqueeze(2)).squeeze(2).cpu()


def answer_error(answer: Generation, reference: Tensor) -> float:
    """Root mean square difference of log-probabilities."""
    return float((torch.tensor(answer.logprobs) - reference).square().mean().sqrt())


def _adapter_names(peer: PeerModel, adapters: Sequence[int | None]) -> dict[str, list[str]]:
    """PEFT's argument; a plain transformers model takes none."""
    return {"adapter_names": [adapter_name(idx) for idx in adapters]} if hasattr(peer, "peft_config") else {}
