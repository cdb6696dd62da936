"""Linear layers on int8 weights.

Checks arguments and chooses between the Triton kernels (CUDA tensors) and the reference (everything else;
float64 always). `weft_kernels.int8.reference` and `weft_kernels.int8.fused` hold the two.
"""

import torch
from torch import Tensor

from weft_kernels.int8 import reference
from weft_kernels.int8.weight import Int8Weight
from weft_kernels.product import Plan, default_plan

__all__ = ["Int8Weight", "dequantize", "int8_input_grad", "int8_linear"]


def dequantize(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """Decode to a matrix [N, K]: float32 product of code and scale, rounded once to `dtype`."""
    return reference.dequantize(weight, dtype)


def int8_linear(
    x: Tensor, weight: Int8Weight, bias: Tensor | None = None, plan: Plan | None = None
) -> Tensor:
    """`y = x Wᵀ + bias` without gradients on a GPU; differentiable where the reference runs.

    Args:
        x: [T, K], any float dtype.
        weight: [N, K].
        bias: [N] or None.
        plan: how a GPU computes it; None is the default for this shape.

    Returns:
        [T, N] in x's dtype.

    Raises:
        ValueError: a width that does not match.
    """
    _check(x, weight.shape[1])
    if not _use_kernels(x):
        return reference.int8_linear(x, weight, bias)
    from weft_kernels.int8 import fused

    with torch.no_grad():
        return fused.int8_linear(x, weight, bias, plan or default_plan("forward", x.shape[0], weight.shape))


def int8_input_grad(dy: Tensor, weight: Int8Weight, plan: Plan | None = None) -> Tensor:
    """`dx = dy W`: [T, N] to [T, K], in dy's dtype; `plan` as for `int8_linear`.

    Raises:
        ValueError: a width that does not match.
    """
    _check(dy, weight.shape[0])
    if not _use_kernels(dy):
        return reference.int8_input_grad(dy, weight)
    from weft_kernels.int8 import fused

    with torch.no_grad():
        return fused.int8_input_grad(
            dy, weight, plan or default_plan("input_grad", dy.shape[0], weight.shape)
        )


def _use_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def _check(x: Tensor, width: int) -> None:
    if x.dim() != 2 or x.shape[1] != width or not x.is_floating_point():
        raise ValueError(f"expected a float matrix of width {width}, got {tuple(x.shape)} {x.dtype}")
