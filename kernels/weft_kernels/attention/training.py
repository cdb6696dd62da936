"""What a forward of finetuning rows leaves to its backward, and where the backward's key gradients go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from weft_kernels.attention.batch import AttentionBatch


class KeyTarget(NamedTuple):
    """Where the key and value gradients of one chunk are added: rows `[first_key, first_key + num_keys)` of
    `d_k` and `d_v`, contiguous `[n, Hkv, D]`, fp32 or wider."""

    d_k: Tensor
    d_v: Tensor
    first_key: int


@dataclass(frozen=True, slots=True)
class SavedAttention:
    """A forward of finetuning rows: inputs, output `[T, H, D]`, and the `stats` `[T, H]` that it wrote.

    The batch need not be the forward's: any chunks of the same rows over the same keys.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: AttentionBatch
    scale: float
    sliding_window: int | None
    out: Tensor
    stats: Tensor
