"""RMSNorm in plain PyTorch: the definition of the op, and the CPU path.

Arguments are checked by the package's entry points; see there for shapes. Few passes over few temporaries:
torch's own norm has no fused kernel on a CPU.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight · x / sqrt(mean(x²) + eps)` over the last axis."""
    x_wide = _widen(x)
    return (x_wide * _inverse_rms(x_wide, eps)).mul_(weight).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x += residual`, in place, and the RMSNorm of the sum."""
    return rms_norm(x.add_(residual), weight, eps)


def rms_norm_backward(
    x: Tensor, weight: Tensor, d_y: Tensor, eps: float, d_residual: Tensor | None = None
) -> Tensor:
    """With `d̂ = d_y · weight`: `inverse · d̂ - inverse³ · mean(d̂ · x) · x + d_residual`."""
    x_wide = _widen(x)
    inverse = _inverse_rms(x_wide, eps)
    d_hat = _widen(d_y) * weight
    mean = (d_hat * x_wide).mean(-1, keepdim=True)
    d_x = d_hat.mul_(inverse).addcmul_(x_wide, mean * inverse**3, value=-1)
    if d_residual is not None:
        d_x.add_(d_residual)
    return d_x.to(x.dtype)


def _inverse_rms(x_wide: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
    return torch.rsqrt(norm * norm / x_wide.shape[-1] + eps)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
