"""Cross-entropy of a frozen linear head, with its gradient, in one pass over the vocabulary.

    loss_t = log Σ_v exp z_tv - z_t,label        d_x_t = Σ_v softmax(z_t)_v W_v - W_label        z = x Wᵀ

The vocabulary is walked in chunks. As in attention, what has been summed is rescaled whenever a larger logit
appears (Milakov and Gimelshein 2018), so that logits are computed once and never held beyond a chunk.
Products are the library's; on a GPU one kernel does all that lies between the two of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft_kernels.cross_entropy import reference
from weft_kernels.cross_entropy.reference import CrossEntropy

__all__ = ["CrossEntropy", "linear_cross_entropy"]

_CHUNK_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 24, "meta": 1 << 24}


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, chunk_columns: int | None = None
) -> CrossEntropy:
    """Loss of each row, whether its label is the most likely token, and the gradient of the losses' SUM.

    Args:
        x: rows `[T, K]`.
        weight: head `[V, K]`, in the dtype of `x`.
        labels: `[T]` int64 in `[0, V)`.
        chunk_columns: tokens of the vocabulary whose logits are held at a time; by default as many as make
            16 Mi logits, on a CPU 2 Mi, which stay in its caches between the passes over them.

    Sums are fp32 (fp64 for fp64 inputs). Of equal logits the first is the most likely.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1]:
        raise ValueError(
            f"rows {tuple(x.shape)}, head {tuple(weight.shape)}, labels {tuple(labels.shape)} do not fit"
        )
    if x.dtype != weight.dtype or labels.dtype != torch.int64:
        raise ValueError(f"cannot mix rows of {x.dtype}, a head of {weight.dtype}, labels of {labels.dtype}")
    if not x.device == weight.device == labels.device:
        raise ValueError(f"on different devices: {x.device}, {weight.device}, {labels.device}")
    if chunk_columns is None:
        chunk_columns = max(_CHUNK_LOGITS[x.device.type] // max(len(x), 1), 1024)
    if chunk_columns < 1:
        raise ValueError(f"chunk_columns must be positive, got {chunk_columns}")
    if x.is_cuda and x.dtype != torch.float64:
        from weft_kernels.cross_entropy import fused

        return fused.linear_cross_entropy(x, weight, labels, chunk_columns)
    return reference.linear_cross_entropy(x, weight, labels, chunk_columns)
