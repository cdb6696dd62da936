"""The Triton kernels of int8 weights: `x Wᵀ` and `dy W` with the decoding inside the tile.

Unchecked device code; `fused.py` launches it. Codes are whole numbers below 128, which every float dtype
holds exactly. So the forward product multiplies codes and scales the sums, with no rounding of decoded
weights at all; the gradient sums over the scaled axis and decodes as the reference does.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def int8_linear_kernel(
    x,
    y,
    bias,
    codes,
    scales,
    num_rows,
    N,
    K,
    split_columns,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`y[s, t, n] = scales[n] · Σ_k x[t, k] codes[n, k] + bias[n]` over the k of split s.

    A program owns BLOCK_M × BLOCK_N of one split of y, float32 sums; the codes are the left operand,
    converted in registers. WHOLE: rows and splits hold whole steps of BLOCK_K.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    n_mask = n < N
    m_mask = m < num_rows
    w_rows = codes + n.to(tl.int64)[:, None] * K
    x_rows = x + m.to(tl.int64)[None, :] * K
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    begin = split * split_columns
    for first in range(begin, min(begin + split_columns, K), BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        w_mask = n_mask[:, None]
        x_mask = m_mask[None, :]
        if not WHOLE:
            w_mask = w_mask & (k < K)[None, :]
            x_mask = x_mask & (k < K)[:, None]
        w_tile = tl.load(w_rows + k[None, :], mask=w_mask, other=0)
        x_tile = tl.load(x_rows + k[:, None], mask=x_mask, other=0.0)
        acc += tl.dot(w_tile.to(x.dtype.element_ty), x_tile, input_precision="ieee")
    acc *= tl.load(scales + n, mask=n_mask, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    row = (split * num_rows + m).to(tl.int64)
    tl.store(
        y + row[None, :] * N + n[:, None], acc.to(y.dtype.element_ty), mask=m_mask[None, :] & n_mask[:, None]
    )


@triton.jit(do_not_specialize=["num_rows"])
def int8_input_grad_kernel(
    dy,
    dx,
    codes,
    scales,
    num_rows,
    N,
    K,
    split_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`dx[s, t, k] = Σ_n dy[t, n] (scales[n] · codes[n, k])` over the n of split s.

    A program owns BLOCK_M × BLOCK_K of one split of dx, float32 sums; decoded values are rounded to dy's
    dtype.
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(2)
    m_mask = m < num_rows
    k_mask = k < K
    dy_rows = dy + m.to(tl.int64)[:, None] * N
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    begin = split * split_rows
    for first in range(begin, min(begin + split_rows, N), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        n_mask = n < N
        dy_tile = tl.load(dy_rows + n[None, :], mask=m_mask[:, None] & n_mask[None, :], other=0.0)
        w_rows = codes + n.to(tl.int64)[:, None] * K
        w_tile = tl.load(w_rows + k[None, :], mask=n_mask[:, None] & k_mask[None, :], other=0)
        values = w_tile.to(tl.float32) * tl.load(scales + n, mask=n_mask, other=0.0)[:, None]
        acc += tl.dot(dy_tile, values.to(dy.dtype.element_ty), input_precision="ieee")
    row = (split * num_rows + m).to(tl.int64)
    mask = m_mask[:, None] & k_mask[None, :]
    tl.store(dx + row[:, None] * K + k[None, :], acc.to(dx.dtype.element_ty), mask=mask)
