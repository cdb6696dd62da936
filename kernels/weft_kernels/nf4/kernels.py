"""The Triton kernels of NF4 weights: decode, `x Wᵀ` and `dy W` with the decoding inside the tile.

Unchecked device code; `fused.py` launches it. Scales are addressed through `absmax` (float32 per block) or,
with NESTED, through codes, group scales and group offsets. Launched without multiply-add contraction, so that
decoded values equal the reference bit for bit.

The two elements of a byte are never interleaved: a tile of bytes decodes to two matrices, of the even and of
the odd columns of W, and each has its own product. Tiles advance in pieces of 32 bytes, as a block of 64
elements has.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from weft_kernels.nf4.lookup import look_up

PIECE_BYTES = 32
PIECES = 4
"""Pieces a program of `nf4_linear_kernel` takes at a time: 128 bytes of each row of W."""

_PIECE = tl.constexpr(PIECE_BYTES)
_PIECES = tl.constexpr(PIECES)


@triton.jit
def _scales(
    absmax,
    absmax_codes,
    nested_absmax,
    nested_offset,
    nested_map,
    block,
    mask,
    NESTED: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Float32 scales of the given blocks; 0 outside the mask.

    WORDS: load nested codes four at a time, of which one is used; a loop prefetches nothing narrower.
    """
    if NESTED:
        if WORDS:
            quads = tl.load(absmax_codes.to(tl.pointer_type(tl.int32)) + block // 4, mask=mask, other=0)
            code = (quads >> (block % 4 * 8).to(tl.int32)) & 255
        else:
            code = tl.load(absmax_codes + block, mask=mask, other=0).to(tl.int32)
        group = block // 256
        product = tl.load(nested_map + code) * tl.load(nested_absmax + group, mask=mask, other=0.0)
        scales = product + tl.load(nested_offset + group, mask=mask, other=0.0)
    else:
        scales = tl.load(absmax + block, mask=mask, other=0.0)
    return scales


@triton.jit
def _decode(packed, scales, quant_map, SHUFFLED: tl.constexpr, WEIGHT_DTYPE: tl.constexpr):
    """Values of the even and of the odd elements, rounded to the recorded dtype."""
    even, odd = look_up(packed, quant_map, SHUFFLED)
    return (even * scales).to(WEIGHT_DTYPE), (odd * scales).to(WEIGHT_DTYPE)


@triton.jit
def _unpack(words, DTYPE: tl.constexpr):
    """The even and odd elements of a row-major matrix that was loaded as words of two."""
    if words.dtype == tl.int32:
        even, odd = words.to(tl.int16), (words >> 16).to(tl.int16)
    else:
        even, odd = words.to(tl.int32), (words >> 32).to(tl.int32)
    return even.to(DTYPE, bitcast=True), odd.to(DTYPE, bitcast=True)


@triton.jit
def nf4_dequantize_kernel(
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
    SHUFFLED: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """`out[e] = quant_map[code e] · scale[e ÷ block size]`; a program owns BLOCKS quantization blocks."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    packed = tl.load(codes + byte, mask=byte < num_bytes, other=0)
    mask = block < num_blocks
    scales = _scales(
        absmax, absmax_codes, nested_absmax, nested_offset, nested_map, block, mask, NESTED, False
    )
    even, odd = _decode(packed, scales[:, None], quant_map, SHUFFLED, WEIGHT_DTYPE)
    values = tl.interleave(even, odd)
    element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    tl.store(out + element, values.to(out.dtype.element_ty), mask=element < num_elements)


@triton.jit(do_not_specialize=["num_rows"])
def nf4_linear_kernel(
    words,
    y,
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
    row_bytes,
    split_bytes,
    HAS_BIAS: tl.constexpr,
    NESTED: tl.constexpr,
    SCALES: tl.constexpr,
    WHOLE: tl.constexpr,
    SHUFFLED: tl.constexpr,
    DTYPE: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`y[s, t, n] = Σ_k x[t, k] W[n, k] + bias[n]` over the k of split s.

    A program owns BLOCK_M × BLOCK_N of one split of y, float32 sums; W is the left operand, so that its
    decoded values go to the tensor cores from registers. `words` is x, two elements a word.

    SCALES: "quad" where the four pieces of a step have one word of nested codes a row; "row" where a piece of
    a row lies in one block, and nested codes fill words; else "byte". WHOLE: rows and splits hold whole
    steps.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    n_mask = n < N
    m_mask = m < num_rows
    byte = tl.arange(0, _PIECE)
    start = n.to(tl.int64) * row_bytes
    w_rows = codes + start[:, None] + byte[None, :]
    x_rows = words + m.to(tl.int64)[None, :] * row_bytes + byte[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    begin = split * split_bytes
    for first in range(begin, min(begin + split_bytes, row_bytes), _PIECE * _PIECES):
        if SCALES == "quad":
            step = (start + first) // (_PIECE * _PIECES)
            quad = tl.load(absmax_codes.to(tl.pointer_type(tl.int32)) + step, mask=n_mask, other=0)
            group_scale = tl.load(nested_absmax + step // 64, mask=n_mask, other=0.0)
            group_offset = tl.load(nested_offset + step // 64, mask=n_mask, other=0.0)
        for piece in tl.static_range(_PIECES):
            at = first + piece * _PIECE
            w_mask = n_mask[:, None]
            x_mask = m_mask[None, :]
            if not WHOLE:
                w_mask = w_mask & (at + byte < row_bytes)[None, :]
                x_mask = x_mask & (at + byte < row_bytes)[:, None]
            packed = tl.load(w_rows + at, mask=w_mask, other=0)
            if SCALES == "quad":
                code = (quad >> (8 * piece)) & 255
                scales = (tl.load(nested_map + code) * group_scale + group_offset)[:, None]
            elif SCALES == "row":
                block = (start + at) // (BLOCK_SIZE // 2)
                row_mask = n_mask & (start + at < start + row_bytes)
                scales = _scales(
                    absmax,
                    absmax_codes,
                    nested_absmax,
                    nested_offset,
                    nested_map,
                    block,
                    row_mask,
                    NESTED,
                    True,
                )[:, None]
            else:
                block = (start[:, None] + at + byte[None, :]) // (BLOCK_SIZE // 2)
                scales = _scales(
                    absmax,
                    absmax_codes,
                    nested_absmax,
                    nested_offset,
                    nested_map,
                    block,
                    w_mask,
                    NESTED,
                    False,
                )
            w_even, w_odd = _decode(packed, scales, quant_map, SHUFFLED, WEIGHT_DTYPE)
            x_even, x_odd = _unpack(tl.load(x_rows + at, mask=x_mask, other=0), DTYPE)
            acc += tl.dot(w_even.to(DTYPE), x_even, input_precision="ieee")
            acc += tl.dot(w_odd.to(DTYPE), x_odd, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    row = (split * num_rows + m).to(tl.int64)
    tl.store(
        y + row[None, :] * N + n[:, None], acc.to(y.dtype.element_ty), mask=m_mask[None, :] & n_mask[:, None]
    )


@triton.jit(do_not_specialize=["num_rows"])
def nf4_input_grad_kernel(
    dy,
    dx,
    codes,
    absmax,
    absmax_codes,
    nested_absmax,
    nested_offset,
    nested_map,
    quant_map,
    num_rows,
    N,
    row_bytes,
    split_rows,
    NESTED: tl.constexpr,
    SCALES: tl.constexpr,
    SHUFFLED: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`dx[s, t, k] = Σ_n dy[t, n] W[n, k]` over the n of split s.

    A program owns BLOCK_M × one piece (64 columns) of one split of dx, float32 sums. SCALES: as in
    `nf4_linear_kernel`, "row" or "byte".
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    first_byte = tl.program_id(0) * _PIECE
    byte = first_byte + tl.arange(0, _PIECE)
    m_mask = m < num_rows
    byte_mask = byte < row_bytes
    dy_rows = dy + m.to(tl.int64)[:, None] * N
    acc_even = tl.zeros((BLOCK_M, _PIECE), dtype=tl.float32)
    acc_odd = tl.zeros((BLOCK_M, _PIECE), dtype=tl.float32)
    begin = split * split_rows
    for first in range(begin, min(begin + split_rows, N), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        n_mask = n < N
        dy_tile = tl.load(dy_rows + n[None, :], mask=m_mask[:, None] & n_mask[None, :], other=0.0)
        mask = n_mask[:, None] & byte_mask[None, :]
        start = n.to(tl.int64) * row_bytes
        packed = tl.load(codes + start[:, None] + byte[None, :], mask=mask, other=0)
        if SCALES == "row":
            block = (start + first_byte) // (BLOCK_SIZE // 2)
            scales = _scales(
                absmax,
                absmax_codes,
                nested_absmax,
                nested_offset,
                nested_map,
                block,
                n_mask,
                NESTED,
                True,
            )[:, None]
        else:
            block = (start[:, None] + byte[None, :]) // (BLOCK_SIZE // 2)
            scales = _scales(
                absmax,
                absmax_codes,
                nested_absmax,
                nested_offset,
                nested_map,
                block,
                mask,
                NESTED,
                False,
            )
        w_even, w_odd = _decode(packed, scales, quant_map, SHUFFLED, WEIGHT_DTYPE)
        acc_even += tl.dot(dy_tile, w_even.to(dy.dtype.element_ty), input_precision="ieee")
        acc_odd += tl.dot(dy_tile, w_odd.to(dy.dtype.element_ty), input_precision="ieee")
    k = tl.program_id(0) * (2 * _PIECE) + tl.arange(0, 2 * _PIECE)
    row = (split * num_rows + m).to(tl.int64)
    values = tl.interleave(acc_even, acc_odd).to(dx.dtype.element_ty)
    mask = m_mask[:, None] & (k < 2 * row_bytes)[None, :]
    tl.store(dx + row[:, None] * (2 * row_bytes) + k[None, :], values, mask=mask)
