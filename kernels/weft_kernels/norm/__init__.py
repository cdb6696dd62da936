"""RMSNorm of rows, alone or after a residual addition, and its backward.

    y = weight · x / sqrt(mean(x²) + eps)        over the last axis, fp32 inside (fp64 stays fp64)

On a GPU the plain forward is torch's own, which is one kernel there, and so is here what torch launches as
several: the addition with the norm after it, and the backward with the addition after it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels.norm import reference

__all__ = ["add_rms_norm", "rms_norm", "rms_norm_backward"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis of `[..., N]` with `weight` `[N]`, in the dtype of `x`."""
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x += residual`, in place, and the RMSNorm of the sum.

    Args:
        x: `[T, N]` with contiguous rows, overwritten with the sum.
        residual: `[T, N]`.
        weight: `[N]`.

    Returns:
        `[T, N]` in the dtype of `x`.

    Raises:
        ValueError: shapes or devices that do not belong together.
    """
    _check(x, residual, weight)
    if _use_kernels(x):
        from weft_kernels.norm import fused

        return fused.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def rms_norm_backward(
    x: Tensor, weight: Tensor, d_y: Tensor, eps: float, d_residual: Tensor | None = None
) -> Tensor:
    """Cotangent of the input of `rms_norm`, plus that of the residual branch beside it.

    Args:
        x: the norm's input `[T, N]`.
        weight: `[N]`.
        d_y: cotangent of its output `[T, N]`.
        d_residual: `[T, N]`, added; None for nothing.

    Returns:
        `[T, N]` in the dtype of `x`.

    Raises:
        ValueError: shapes or devices that do not belong together.
    """
    _check(x, d_y, weight)
    if d_residual is not None:
        _check(x, d_residual, weight)
    if _use_kernels(x):
        from weft_kernels.norm import fused

        return fused.rms_norm_backward(x, weight, d_y, eps, d_residual)
    return reference.rms_norm_backward(x, weight, d_y, eps, d_residual)


def _use_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def _check(x: Tensor, other: Tensor, weight: Tensor) -> None:
    if x.dim() != 2 or x.shape != other.shape or weight.shape != x.shape[1:]:
        raise ValueError(
            f"rows {tuple(x.shape)}, {tuple(other.shape)} and weight {tuple(weight.shape)} do not fit"
        )
    if not x.device == other.device == weight.device:
        raise ValueError(f"rows and weight are on {x.device}, {other.device} and {weight.device}")
    if x.stride(1) != 1 or other.stride(1) != 1:
        raise ValueError(f"rows must be contiguous, got strides {x.stride()} and {other.stride()}")
