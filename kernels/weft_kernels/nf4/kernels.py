"""The Triton kernels of NF4 weights: decode, `x Wᵀ` and `dy W` with the decoding inside the tile.

Unchecked device code; `fused.py` launches it. Scales are addressed through `absmax` (float32 per block) or,
with NESTED, through codes, group scales and group offsets. Launched without multiply-add contraction, so that
decoded values equal the reference bit for bit.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _scales(
    absmax, absmax_codes, nested_absmax, nested_offset, nested_map, block, mask, NESTED: tl.constexpr
):
    """Float32 scales of the given blocks; 0 outside the mask."""
    if NESTED:
        code = tl.load(absmax_codes + block, mask=mask, other=0).to(tl.int32)
        group = block // 256
        product = tl.load(nested_map + code) * tl.load(nested_absmax + group, mask=mask, other=0.0)
        scales = product + tl.load(nested_offset + group, mask=mask, other=0.0)
    else:
        scales = tl.load(absmax + block, mask=mask, other=0.0)
    return scales


@triton.jit
def _look_up(quant_map, code, CACHED: tl.constexpr):
    """`quant_map[code]`. CACHED hides the load from the software pipeliner, which would stage every lookup
    through an asynchronous copy; the 64-byte map lives in L1 anyway."""
    address = quant_map + code.to(tl.int32)
    if CACHED:
        value = tl.inline_asm_elementwise(
            "ld.global.ca.f32 $0, [$1];",
            "=f,l",
            [address.to(tl.int64)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        value = tl.load(address)
    return value


@triton.jit
def _decode(packed, scales, quant_map, WEIGHT_DTYPE: tl.constexpr, CACHED: tl.constexpr):
    """Bytes [.., n] times their scales, as interleaved elements [.., 2n], rounded to the recorded dtype."""
    even = _look_up(quant_map, packed >> 4, CACHED) * scales
    odd = _look_up(quant_map, packed & 15, CACHED) * scales
    return tl.interleave(even.to(WEIGHT_DTYPE), odd.to(WEIGHT_DTYPE))


@triton.jit
def _weight_tile(
    codes,
    absmax,
    absmax_codes,
    nested_absmax,
    nested_offset,
    nested_map,
    quant_map,
    row_bytes,
    n,
    n_mask,
    first_byte,
    NESTED: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    CACHED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The decoded tile of rows `n` and BLOCK_K columns from byte `first_byte` of each row.

    WHOLE_BLOCKS: a row holds whole tiles and a tile row lies in one block, so that it needs a single scale.
    """
    byte = first_byte + tl.arange(0, BLOCK_K // 2)
    mask = n_mask[:, None] & (byte < row_bytes)[None, :]
    start = n.to(tl.int64) * row_bytes
    packed = tl.load(codes + start[:, None] + byte[None, :], mask=mask, other=0)
    if WHOLE_BLOCKS:
        block = (start + first_byte) // (BLOCK_SIZE // 2)
        scales = _scales(
            absmax, absmax_codes, nested_absmax, nested_offset, nested_map, block, n_mask, NESTED
        )[:, None]
    else:
        block = (start[:, None] + byte[None, :]) // (BLOCK_SIZE // 2)
        scales = _scales(absmax, absmax_codes, nested_absmax, nested_offset, nested_map, block, mask, NESTED)
    return _decode(packed, scales, quant_map, WEIGHT_DTYPE, CACHED)


@triton.jit
def dequantize_kernel(
    out,
    codes,
    absmax,
    absmax_codes,
    nested_absmax,
    nested_offset,
    nested_map,
    quant_map,
    num_elements,
    num_bytes,
    num_blocks,
    NESTED: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """`out[e] = quant_map[code e] · scale[e ÷ block size]`; a program owns BLOCKS quantization blocks."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    packed = tl.load(codes + byte, mask=byte < num_bytes, other=0)
    scales = _scales(
        absmax, absmax_codes, nested_absmax, nested_offset, nested_map, block, block < num_blocks, NESTED
    )
    values = _decode(packed, scales[:, None], quant_map, WEIGHT_DTYPE, False)
    element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    tl.store(out + element, values.to(out.dtype.element_ty), mask=element < num_elements)


@triton.jit
def linear_kernel(
    x,
    x_stride,
    y,
    y_stride,
    bias,
    codes,
    absmax,
    absmax_codes,
    nested_absmax,
    nested_offset,
    nested_map,
    quant_map,
    num_rows,
    N,
    K,
    row_bytes,
    HAS_BIAS: tl.constexpr,
    NESTED: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    CACHED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`y[t, n] = Σ_k x[t, k] W[n, k] + bias[n]`; a program owns BLOCK_M × BLOCK_N of y, float32 sums."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask = m < num_rows
    n_mask = n < N
    x_rows = x + m.to(tl.int64)[:, None] * x_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x_rows + k[None, :], mask=m_mask[:, None] & (k < K)[None, :], other=0.0)
        w_tile = _weight_tile(
            codes,
            absmax,
            absmax_codes,
            nested_absmax,
            nested_offset,
            nested_map,
            quant_map,
            row_bytes,
            n,
            n_mask,
            first // 2,
            NESTED,
            WHOLE_BLOCKS,
            WEIGHT_DTYPE,
            CACHED,
            BLOCK_SIZE,
            BLOCK_K,
        )
        acc += tl.dot(x_tile, tl.trans(w_tile.to(x.dtype.element_ty)), input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    y_tile = y + m.to(tl.int64)[:, None] * y_stride + n[None, :]
    tl.store(y_tile, acc.to(y.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


@triton.jit
def input_grad_kernel(
    dy,
    dy_stride,
    dx,
    dx_stride,
    codes,
    absmax,
    absmax_codes,
    nested_absmax,
    nested_offset,
    nested_map,
    quant_map,
    num_rows,
    N,
    K,
    row_bytes,
    NESTED: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    CACHED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`dx[t, k] = Σ_n dy[t, n] W[n, k]`; a program owns BLOCK_M × BLOCK_K of dx, float32 sums."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_mask = m < num_rows
    dy_rows = dy + m.to(tl.int64)[:, None] * dy_stride
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        n_mask = n < N
        dy_tile = tl.load(dy_rows + n[None, :], mask=m_mask[:, None] & n_mask[None, :], other=0.0)
        w_tile = _weight_tile(
            codes,
            absmax,
            absmax_codes,
            nested_absmax,
            nested_offset,
            nested_map,
            quant_map,
            row_bytes,
            n,
            n_mask,
            tl.program_id(0) * (BLOCK_K // 2),
            NESTED,
            WHOLE_BLOCKS,
            WEIGHT_DTYPE,
            CACHED,
            BLOCK_SIZE,
            BLOCK_K,
        )
        acc += tl.dot(dy_tile, w_tile.to(dy.dtype.element_ty), input_precision="ieee")
    dx_tile = dx + m.to(tl.int64)[:, None] * dx_stride + k[None, :]
    tl.store(dx_tile, acc.to(dx.dtype.element_ty), mask=m_mask[:, None] & (k < K)[None, :])
