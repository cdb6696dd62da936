"""The loss head: summed cross-entropy of a window and its gradient, without a vocabulary-wide tensor that
outlives a chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from weft_server.model.decoder import rms_norm_backward


@dataclass(frozen=True, slots=True)
class WindowLoss:
    """Of `T` rows: `loss` `[T]` negative log-likelihoods (0 where not trained), `correct` `[T]` bool (the
    most likely token is the label), `d_hidden` `[T, hidden]` the gradient of the SUM of the losses."""

    loss: Tensor
    correct: Tensor
    d_hidden: Tensor


def loss_head(
    hidden: Tensor,
    labels: Tensor,
    trained: Tensor,
    norm: Tensor,
    lm_head: Tensor,
    *,
    eps: float,
    chunk_rows: int = 256,
) -> WindowLoss:
    """Final norm, frozen head and cross-entropy of `[T, hidden]` against `labels` `[T]`, with the gradient.

    `trained` `[n]` int64 are the rows that have a label. Only they are computed, `chunk_rows` at a time.
    Log-probabilities are fp32 (fp64 for fp64 inputs).
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    loss = torch.zeros(len(labels), dtype=wide, device=hidden.device)
    correct = torch.zeros(len(labels), dtype=torch.bool, device=hidden.device)
    d_hidden = torch.zeros_like(hidden)
    for rows in torch.split(trained, chunk_rows):
        x, target = hidden.index_select(0, rows), labels.index_select(0, rows)
        normed = F.rms_norm(x, (x.shape[-1],), norm, eps)
        log_probs = F.log_softmax(F.linear(normed, lm_head).to(wide), dim=-1)
        loss.index_copy_(0, rows, F.nll_loss(log_probs, target, reduction="none"))
        correct.index_copy_(0, rows, log_probs.argmax(-1) == target)
        d_logits = log_probs.exp_()
        d_logits.scatter_add_(1, target.unsqueeze(1), d_logits.new_full((len(rows), 1), -1.0))
        d_normed = d_logits.to(hidden.dtype) @ lm_head
        d_hidden.index_copy_(0, rows, rms_norm_backward(x, norm, d_normed, eps))
    return WindowLoss(loss, correct, d_hidden)
