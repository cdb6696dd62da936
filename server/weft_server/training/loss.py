"""The loss head: summed cross-entropy of a window and its gradient, without a vocabulary-wide tensor that
outlives a chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft_kernels.cross_entropy import linear_cross_entropy
from weft_kernels.norm import rms_norm, rms_norm_backward


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

    `trained` `[n]` int64 are the rows that have a label. Only they are computed, `chunk_rows` at a time and
    a part of the vocabulary at a time. Log-probabilities are fp32 (fp64 for fp64 inputs).
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    loss = torch.zeros(len(labels), dtype=wide, device=hidden.device)
    correct = torch.zeros(len(labels), dtype=torch.bool, device=hidden.device)
    d_hidden = torch.zeros_like(hidden)
    for rows in torch.split(trained, chunk_rows):
        x, target = hidden.index_select(0, rows), labels.index_select(0, rows)
        head = linear_cross_entropy(rms_norm(x, norm, eps), lm_head, target)
        loss.index_copy_(0, rows, head.loss)
        correct.index_copy_(0, rows, head.correct)
        d_hidden.index_copy_(0, rows, rms_norm_backward(x, norm, head.d_x, eps))
    return WindowLoss(loss, correct, d_hidden)
