"""Dropout on the LoRA input as a pure function of a per-row key, so that recomputing gives the same mask.

Owns the hash that defines the mask; the Triton kernels repeat it bit for bit. Knows nothing of seeds, steps
or examples: whoever builds the batch folds those into the keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LoraDropout:
    """Dropout of the rows of one flat batch.

    Attributes:
        p: float32 [T], the probability of zeroing an element; 0 for rows without dropout (all inference
        rows). keys: int64 [T]; equal keys give equal masks, whatever else is in the batch.
        active: False declares every `p` to be 0, which skips the work.
    """

    p: Tensor
    keys: Tensor
    active: bool = True

    def select(self, rows: slice | Tensor) -> "LoraDropout":
        """The dropout of a subset of rows."""
        return LoraDropout(self.p[rows], self.keys[rows], self.active)


def dropout_mask(dropout: LoraDropout, layer: int, module: int, num_features: int) -> Tensor:
    """The multiplier of every input element: 0 where dropped, 1/(1-p) where kept.

    Element k of a row is kept iff `uniform(key, layer, module, k) >= p`, where `uniform` is 24 bits of a
    32-bit integer hash: two rounds of the lowbias32 finalizer seed a row, one more is keyed by a Weyl
    sequence over k.

    Returns:
        float32 [T, num_features].
    """
    low = dropout.keys.to(torch.int32)
    high = (dropout.keys >> 32).to(torch.int32)
    site = _signed((layer * 64 + module + 1) * _WEYL)
    seed = _mix(low + site)
    twist = _mix(high ^ seed)
    columns = torch.arange(num_features, dtype=torch.int32, device=low.device) * _signed(_WEYL)
    bits = columns[None, :] + seed[:, None]
    bits ^= _shift(bits, 16)
    bits *= _signed(_MIX_1)
    bits ^= twist[:, None]
    bits ^= _shift(bits, 15)
    bits *= _signed(_MIX_2)
    bits ^= _shift(bits, 16)
    uniform = _shift(bits, 8).to(torch.float32).mul_(2.0**-24)
    p = dropout.p[:, None]
    return torch.where(uniform >= p, 1.0 / (1.0 - p), torch.zeros_like(p))


_WEYL = 0x9E3779B9
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 16)) * _signed(_MIX_1)
    bits = (bits ^ _shift(bits, 15)) * _signed(_MIX_2)
    return bits ^ _shift(bits, 16)


def _shift(bits: Tensor, count: int) -> Tensor:
    """Logical right shift of int32 (torch's own is arithmetic)."""
    return (bits >> count) & ((1 << (32 - count)) - 1)


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value
