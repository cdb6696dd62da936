"""SwiGLU in Triton, for CUDA tensors and, under Triton's interpreter, CPU tensors.

Same functions as `reference.py`, which defines them; arguments are checked by the package's entry points.
"""

import torch
import triton
from torch import Tensor

from weft_kernels.swiglu.kernels import swiglu_backward_kernel, swiglu_kernel

_BLOCK = 1024


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) · up`."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    product = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    swiglu_kernel[(num_rows, triton.cdiv(width, _BLOCK))](
        gate_up, product, width, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True
    )
    return product


def swiglu_backward(gate_up: Tensor, d_product: Tensor) -> Tensor:
    """Cotangent of `gate_up`."""
    num_rows, width = d_product.shape
    if d_product.stride(1) != 1:
        d_product = d_product.contiguous()
    d_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    swiglu_backward_kernel[(num_rows, triton.cdiv(width, _BLOCK))](
        *(gate_up, d_product, d_product.stride(0), d_gate_up, width),
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return d_gate_up
