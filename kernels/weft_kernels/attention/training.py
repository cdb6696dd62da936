"""What a windowed forward keeps for its backward, and where the backward's key gradients go."""

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
    """One windowed forward: its inputs and output, and statistics of its rows, whose meaning is the
    implementation's that computed them."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: AttentionBatch
    scale: float
    sliding_window: int | None
    out: Tensor
    stats: tuple[Tensor | None, ...]
