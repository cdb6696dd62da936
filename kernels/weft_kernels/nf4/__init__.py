"""Linear layers on NF4 weights.

Checks arguments and chooses between the Triton kernels (CUDA tensors) and the reference (everything else;
float64 always). `weft_kernels.nf4.reference` and `weft_kernels.nf4.fused` hold the two.
"""

import torch
from torch import Tensor

from weft_kernels.nf4 import reference
from weft_kernels.nf4.weight import NESTED_BLOCK_SIZE, NF4_VALUES, Nf4Weight, can_concatenate, concatenate
from weft_kernels.product import Plan, default_plan

__all__ = [
    "NESTED_BLOCK_SIZE",
    "NF4_VALUES",
    "Nf4Weight",
    "can_concatenate",
    "concatenate",
    "dequantize",
    "nf4_input_grad",
    "nf4_linear",
]


def dequantize(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """Decode to a matrix [N, K]: float32 product of map and scale, rounded to `weight.dtype`, then to
    `dtype`.

    Bit-identical to bitsandbytes' `dequantize_4bit`.
    """
    if _use_kernels(weight, dtype):
        from weft_kernels.nf4 import fused

        return fused.dequantize(weight, dtype)
    return reference.dequantize(weight, dtype)


def nf4_linear(x: Tensor, weight: Nf4Weight, bias: Tensor | None = None, plan: Plan | None = None) -> Tensor:
    """`y = x Wᵀ + bias` without gradients.

    Args:
        x: [T, K], any float dtype; the product is in that dtype with float32 accumulation.
        weight: [N, K].
        bias: [N] or None.
        plan: how the kernels compute it; None is the default for this shape.

    Returns:
        [T, N] in x's dtype.

    Raises:
        ValueError: widths or devices that do not match.
    """
    _check(x, weight, weight.shape[1])
    if bias is not None and (bias.shape != (weight.shape[0],) or bias.device != x.device):
        raise ValueError(f"bias must be ({weight.shape[0]},) on {x.device}, got {tuple(bias.shape)}")
    with torch.no_grad():
        if _use_kernels(weight, x.dtype):
            from weft_kernels.nf4 import fused

            return fused.nf4_linear(
                x, weight, bias, plan or default_plan("forward", x.shape[0], weight.shape)
            )
        return reference.nf4_linear(x, weight, bias)


def nf4_input_grad(dy: Tensor, weight: Nf4Weight, plan: Plan | None = None) -> Tensor:
    """`dx = dy W`, the input gradient of `nf4_linear`.

    Args:
        dy: [T, N], any float dtype.
        weight: [N, K].
        plan: as for `nf4_linear`.

    Returns:
        [T, K] in dy's dtype.

    Raises:
        ValueError: widths or devices that do not match.
    """
    _check(dy, weight, weight.shape[0])
    with torch.no_grad():
        if _use_kernels(weight, dy.dtype):
            from weft_kernels.nf4 import fused

            return fused.nf4_input_grad(
                dy, weight, plan or default_plan("input_grad", dy.shape[0], weight.shape)
            )
        return reference.nf4_input_grad(dy, weight)


def _use_kernels(weight: Nf4Weight, dtype: torch.dtype) -> bool:
    return weight.device.type == "cuda" and torch.float64 not in (dtype, weight.dtype)


def _check(x: Tensor, weight: Nf4Weight, width: int) -> None:
    if x.dim() != 2 or x.shape[1] != width or not x.is_floating_point():
        raise ValueError(f"expected a float matrix of width {width}, got {tuple(x.shape)} {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"input on {x.device}, weight on {weight.device}")
