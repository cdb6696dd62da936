"""The Triton kernels of RMSNorm: unchecked device code; `fused.py` launches it.

A program owns one row, which it holds in registers; sums are float32.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def add_rms_norm_kernel(
    x, x_stride, residual, residual_stride, weight, y, y_stride, N, eps, BLOCK: tl.constexpr
):
    """`x += residual`; `y = weight · x / sqrt(mean(x²) + eps)`. The sum is rounded before it is used."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < N
    total = tl.load(x + row * x_stride + c, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(residual + row * residual_stride + c, mask=mask, other=0.0).to(tl.float32)
    rounded = total.to(x.dtype.element_ty)
    tl.store(x + row * x_stride + c, rounded, mask=mask)
    total = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(total * total, axis=0) / N + eps)
    w = tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * y_stride + c, (total * inverse * w).to(y.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_backward_kernel(
    x,
    x_stride,
    weight,
    d_y,
    d_y_stride,
    d_residual,
    d_residual_stride,
    d_x,
    d_x_stride,
    N,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`d_x = inverse · (d̂ - x̂ · mean(d̂ · x̂)) + d_residual` with `d̂ = d_y · weight`, `x̂ = x · inverse`."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < N
    x_row = tl.load(x + row * x_stride + c, mask=mask, other=0.0).to(tl.float32)
    d_hat = tl.load(d_y + row * d_y_stride + c, mask=mask, other=0.0).to(tl.float32)
    d_hat *= tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x_row * x_row, axis=0) / N + eps)
    x_hat = x_row * inverse
    out = inverse * (d_hat - x_hat * (tl.sum(d_hat * x_hat, axis=0) / N))
    if HAS_RESIDUAL:
        out += tl.load(d_residual + row * d_residual_stride + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(d_x + row * d_x_stride + c, out.to(d_x.dtype.element_ty), mask=mask)
