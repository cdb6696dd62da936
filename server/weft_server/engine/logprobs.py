"""Log-probabilities of tokens and of the most likely ones: computed with the iteration, read when it is
done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft_kernels.transfer import download
from weft_server.protocol import TokenLogprob


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """Of `S` rows, on their way to the host: `token_ids` `[S]` and their log-probabilities `chosen` `[S]`,
    the best `values` and `ids` `[S, k]`, of which row `i` wants `counts[i]`."""

    token_ids: Tensor
    chosen: Tensor
    values: Tensor
    ids: Tensor
    counts: tuple[int, ...]

    def entries(self) -> list[TokenLogprob]:
        """What clients are told, by row; only after the iteration's event has passed."""
        tokens, chosen = self.token_ids.tolist(), self.chosen.tolist()
        values, ids = self.values.tolist(), self.ids.tolist()
        return [
            TokenLogprob(tokens[i], chosen[i], tuple(zip(ids[i][:count], values[i][:count], strict=True)))
            for i, count in enumerate(self.counts)
        ]


def top_logprobs(logits: Tensor, token_ids: Tensor, counts: Sequence[int]) -> TopLogprobs:
    """Log-probabilities of `token_ids` `[S]` and of the `counts[i]` most likely tokens, from unprocessed
    logits `[S, vocab]`. Issues the work and waits for nothing."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    best = log_probs.topk(min(max(counts), logits.shape[-1]), dim=-1)
    return TopLogprobs(
        download(token_ids),
        download(log_probs.gather(1, token_ids.unsqueeze(1)).squeeze(1)),
        download(best.values),
        download(best.indices),
        tuple(counts),
    )
