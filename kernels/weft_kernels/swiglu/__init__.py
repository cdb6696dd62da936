"""SwiGLU: `silu(gate) · up` with gate and up side by side, and its backward.

Chooses between the Triton kernels (CUDA tensors) and the reference (everything else; float64 always).
"""

import torch
from torch import Tensor

from weft_kernels.swiglu import reference

__all__ = ["swiglu", "swiglu_backward"]


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) · up`.

    Args:
        gate_up: `[T, 2·N]`, contiguous; gate in the first N columns, up in the others.

    Returns:
        `[T, N]` in the dtype of `gate_up`.

    Raises:
        ValueError: not a contiguous matrix with an even number of columns.
    """
    _check(gate_up)
    if _use_kernels(gate_up):
        from weft_kernels.swiglu import fused

        return fused.swiglu(gate_up)
    return reference.swiglu(gate_up)


def swiglu_backward(gate_up: Tensor, d_product: Tensor) -> Tensor:
    """Cotangent of `gate_up` `[T, 2·N]`, given that of the product `[T, N]`.

    Raises:
        ValueError: as `swiglu`, or a cotangent that does not fit.
    """
    _check(gate_up)
    if d_product.shape != (gate_up.shape[0], gate_up.shape[1] // 2) or d_product.device != gate_up.device:
        raise ValueError(
            f"cotangent {tuple(d_product.shape)} on {d_product.device} does not fit {tuple(gate_up.shape)}"
        )
    if _use_kernels(gate_up):
        from weft_kernels.swiglu import fused

        return fused.swiglu_backward(gate_up, d_product)
    return reference.swiglu_backward(gate_up, d_product)


def _use_kernels(gate_up: Tensor) -> bool:
    return gate_up.is_cuda and gate_up.dtype != torch.float64


def _check(gate_up: Tensor) -> None:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise ValueError(f"gate and up must be one contiguous matrix, got {tuple(gate_up.shape)}")
