"""Linear layers on int8 weights: decode the matrix, then the library's product, on every device."""

import torch
from torch import Tensor

from weft_kernels.int8.weight import Int8Weight

__all__ = ["Int8Weight", "dequantize", "int8_input_grad", "int8_linear"]


def dequantize(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """Decode to a matrix [N, K]: float32 product of code and scale, rounded once to `dtype`."""
    return (weight.codes * weight.scales[:, None]).to(dtype)


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """`y = x Wᵀ + bias`.

    Args:
        x: [T, K], any float dtype.
        weight: [N, K].
        bias: [N] or None.

    Returns:
        [T, N] in x's dtype.

    Raises:
        ValueError: a width that does not match.
    """
    _check(x, weight.shape[1])
    return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)


def int8_input_grad(dy: Tensor, weight: Int8Weight) -> Tensor:
    """`dx = dy W`: [T, N] to [T, K], in dy's dtype.

    Raises:
        ValueError: a width that does not match.
    """
    _check(dy, weight.shape[0])
    return dy @ dequantize(weight, dy.dtype)


def _check(x: Tensor, width: int) -> None:
    if x.dim() != 2 or x.shape[1] != width or not x.is_floating_point():
        raise ValueError(f"expected a float matrix of width {width}, got {tuple(x.shape)} {x.dtype}")
