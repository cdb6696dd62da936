"""Int8 encoding: symmetric, one scale per output channel.

Owns the encoder; decoding belongs to `weft_kernels.int8`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft_kernels.int8 import Int8Weight

_LARGEST_CODE = 127


def quantize(weight: Tensor) -> Int8Weight:
    """Encodes a matrix as codes in [-127, 127] times one float32 scale per row; rounds half to even.

    Args:
        weight: [N, K], any floating dtype.

    Raises:
        ValueError: not a floating matrix, or a value that is not finite.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"int8 encodes floating matrices, not {weight.dtype} {tuple(weight.shape)}")
    absmax = weight.abs().amax(dim=1).float()
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError("the weight holds values that are not finite")
    scales = absmax / _LARGEST_CODE
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (weight.float() / divisors[:, None]).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
    return Int8Weight(codes=codes.to(torch.int8), scales=scales)
