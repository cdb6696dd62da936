"""The flat token batch that a forward pass computes: every tenant's tokens, described once for all layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from weft_kernels.attention import AttentionBatch
from weft_kernels.lora import LoraBatch, LoraDropout


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Positions, cache slots, attention and adapters of `T` rows.

    `positions` `[T]` int64 are rotary positions; `slot_mapping` `[T]` int64 says where each row's key and
    value go in the cache. `lora` is None when no row uses an adapter, `dropout` when no row drops out.
    """

    positions: Tensor
    slot_mapping: Tensor
    attention: AttentionBatch
    lora: LoraBatch | None = None
    dropout: LoraDropout | None = None
