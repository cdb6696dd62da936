"""RMSNorm in plain PyTorch: the definition of the op, and the CPU path.

Arguments are checked by the package's entry points; see there for shapes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight · x / sqrt(mean(x²) + eps)` over the last axis."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x += residual`, in place, and the RMSNorm of the sum."""
    return rms_norm(x.add_(residual), weight, eps)


def rms_norm_backward(
    x: Tensor, weight: Tensor, d_y: Tensor, eps: float, d_residual: Tensor | None = None
) -> Tensor:
    """With `x̂ = x · inverse` and `d̂ = d_y · weight`: `inverse · (d̂ - x̂ · mean(d̂ · x̂)) + d_residual`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_wide, d_hat = x.to(wide), d_y.to(wide) * weight.to(wide)
    inverse = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    x_hat = x_wide * inverse
    d_x = inverse * (d_hat - x_hat * (d_hat * x_hat).mean(-1, keepdim=True))
    return d_x.to(x.dtype) if d_residual is None else d_x.to(x.dtype).add_(d_residual)
