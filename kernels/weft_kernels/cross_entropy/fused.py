"""The loss head with a Triton kernel, for CUDA tensors and, under Triton's interpreter, CPU tensors.

Same function as `reference.py`, which defines it; arguments are checked by the package's entry point.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels.cross_entropy.kernels import softmax_chunk_kernel
from weft_kernels.cross_entropy.reference import CrossEntropy

_BLOCK = 2048


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, chunk_columns: int) -> CrossEntropy:
    """Loss, hit and gradient of every row."""
    num_rows, device = x.shape[0], x.device
    # A multiple of 16 bytes apart: Triton compiles anew for pointers of another alignment.
    state = torch.empty((4, -(-num_rows // 4) * 4), dtype=torch.float32, device=device)
    best, total, label_logit, rescale = state[:, :num_rows]
    best_idx = torch.empty((num_rows,), dtype=torch.int64, device=device)
    d_x = torch.zeros(x.shape, dtype=torch.float32, device=device)
    for start in range(0, len(weight), chunk_columns):
        rows = weight[start : start + chunk_columns]
        logits = F.linear(x, rows)
        softmax_chunk_kernel[(num_rows,)](
            *(logits, logits.stride(0), labels, best, best_idx, total, label_logit, rescale),
            *(start, len(rows)),
            BLOCK=_BLOCK,
            num_warps=8,
            enable_fp_fusion=True,
        )
        d_x.mul_(rescale.unsqueeze(1)).add_(logits @ rows)
    d_x.div_(total.unsqueeze(1)).sub_(weight.index_select(0, labels))
    return CrossEntropy(best + total.log() - label_logit, best_idx == labels, d_x.to(x.dtype))
