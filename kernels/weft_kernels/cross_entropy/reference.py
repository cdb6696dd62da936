"""The loss head in plain PyTorch: the definition of the op, and the CPU path.

Arguments are checked by the package's entry point; see there for shapes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class CrossEntropy(NamedTuple):
    """Of `T` rows: `loss` `[T]` fp32 (fp64 for fp64 rows), `correct` `[T]` bool, `d_x` `[T, K]` in the rows'
    dtype."""

    loss: Tensor
    correct: Tensor
    d_x: Tensor


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, chunk_columns: int) -> CrossEntropy:
    """Loss, hit and gradient of every row."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    best = x.new_full((len(x),), -torch.inf, dtype=wide)
    best_idx, total = torch.zeros_like(labels), torch.zeros_like(best)
    d_x = torch.zeros(x.shape, dtype=wide, device=x.device)
    label_logit = torch.zeros_like(best)
    for start in range(0, len(weight), chunk_columns):
        rows = weight[start : start + chunk_columns]
        logits = F.linear(x, rows).to(wide)
        is_here = (labels >= start) & (labels < start + len(rows))
        at = (labels - start).clamp_(0, len(rows) - 1).unsqueeze(1)
        label_logit = torch.where(is_here, logits.gather(1, at).squeeze(1), label_logit)
        top, top_idx = logits.max(dim=1)
        best_idx = torch.where(top > best, top_idx + start, best_idx)
        previous, best = best, torch.maximum(best, top)
        rescale = (previous - best).exp_()
        p = logits.sub_(best.unsqueeze(1)).exp_()
        total = total.mul_(rescale).add_(p.sum(dim=1))
        d_x.mul_(rescale.unsqueeze(1)).add_(p.to(x.dtype) @ rows)
    d_x = d_x.div_(total.unsqueeze(1)).sub_(weight.index_select(0, labels))
    return CrossEntropy(best + total.log() - label_logit, best_idx == labels, d_x.to(x.dtype))
