"""Int8 linear layers in plain PyTorch: the definition of the op, and the CPU path.

Decodes the matrix and calls the library's product. Arguments are checked by the package's entry points.
"""

import torch
from torch import Tensor

from weft_kernels.int8.weight import Int8Weight


def dequantize(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K]; see `weft_kernels.int8.dequantize`."""
    return (weight.codes * weight.scales[:, None]).to(dtype)


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + bias`: [T, N]; see `weft_kernels.int8.int8_linear`."""
    return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)


def int8_input_grad(dy: Tensor, weight: Int8Weight) -> Tensor:
    """`dy W`: [T, K]; see `weft_kernels.int8.int8_input_grad`."""
    return dy @ dequantize(weight, dy.dtype)
