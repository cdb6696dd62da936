"""RMSNorm in Triton, for CUDA tensors and, under Triton's interpreter, CPU tensors.

Same functions as `reference.py`, which defines them; arguments are checked by the package's entry points.
"""

import torch
import triton
from torch import Tensor

from weft_kernels.norm.kernels import add_rms_norm_kernel, rms_norm_backward_kernel


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x += residual`, in place, and the RMSNorm of the sum."""
    (num_rows, width), y = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    add_rms_norm_kernel[(num_rows,)](
        *(x, x.stride(0), residual, residual.stride(0), weight, y, y.stride(0), width, eps),
        BLOCK=block,
        num_warps=_num_warps(block),
        enable_fp_fusion=True,
    )
    return y


def rms_norm_backward(
    x: Tensor, weight: Tensor, d_y: Tensor, eps: float, d_residual: Tensor | None = None
) -> Tensor:
    """Cotangent of the norm's input, plus `d_residual`."""
    (num_rows, width), d_x = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    # Without a residual the kernel is compiled without the load; any tensor stands in.
    residual = d_y if d_residual is None else d_residual
    rms_norm_backward_kernel[(num_rows,)](
        *(x, x.stride(0), weight, d_y, d_y.stride(0), residual, residual.stride(0), d_x, d_x.stride(0)),
        *(width, eps),
        HAS_RESIDUAL=d_residual is not None,
        BLOCK=block,
        num_warps=_num_warps(block),
        enable_fp_fusion=True,
    )
    return d_x


def _num_warps(block: int) -> int:
    """Two vectors of eight a thread, as far as a block may have threads."""
    return min(max(block // 512, 1), 16)
