"""The Triton kernels of SwiGLU: unchecked device code; `fused.py` launches it.

A program owns BLOCK columns of one row; float32 inside.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def swiglu_kernel(gate_up, product, N, BLOCK: tl.constexpr):
    """`product = silu(gate) · up`."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < N
    gate = tl.load(gate_up + row * 2 * N + c, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * N + N + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(product + row * N + c, (gate * tl.sigmoid(gate) * up).to(product.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(gate_up, d_product, d_product_stride, d_gate_up, N, BLOCK: tl.constexpr):
    """`d_gate = d · up · σ (1 + gate (1 - σ))` and `d_up = d · gate · σ`, with `σ = sigmoid(gate)`."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < N
    gate = tl.load(gate_up + row * 2 * N + c, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * N + N + c, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(d_product + row * d_product_stride + c, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = d * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    out = d_gate_up + row * 2 * N + c
    tl.store(out, d_gate.to(d_gate_up.dtype.element_ty), mask=mask)
    tl.store(out + N, (d * gate * sigmoid).to(d_gate_up.dtype.element_ty), mask=mask)
