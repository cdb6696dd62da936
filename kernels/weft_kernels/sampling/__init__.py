"""Drawing tokens: inversion of the cumulative distribution, in token-id order.

One uniform number decides a row, by its own scores alone: neither neighbours nor the order of tokens by
probability have a say. Greedy choices are torch's `argmax`, which is as fast as a kernel of our own.
"""

import torch
from torch import Tensor

from weft_kernels.sampling import reference

__all__ = ["draw"]


def draw(scores: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the row's uniform number.

    Args:
        scores: `[S, V]` fp32, contiguous; probabilities are their softmax, -inf for tokens that must not be.
        uniforms: `[S]` fp64 in [0, 1).

    Returns:
        `[S]` int64 in `[0, V)`, whatever the scores; meaningless where they are not finite.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
    """
    if scores.dim() != 2 or not scores.is_contiguous() or uniforms.shape != scores.shape[:1]:
        raise ValueError(f"{tuple(uniforms.shape)} numbers do not fit scores {tuple(scores.shape)}")
    if scores.dtype != torch.float32 or uniforms.dtype != torch.float64:
        raise ValueError(f"expected float32 and float64, got {scores.dtype} and {uniforms.dtype}")
    if scores.device != uniforms.device:
        raise ValueError(f"on different devices: {scores.device} and {uniforms.device}")
    if scores.is_cuda:
        from weft_kernels.sampling import fused

        return fused.draw(scores, uniforms)
    return reference.draw(scores, uniforms)
