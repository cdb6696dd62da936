"""The Triton kernels of batched LoRA: shrink, expand and weight gradient.

Unchecked device code; `fused.py` launches it. The op is symmetric: `v = s · x Aᵀ` and `u = s · dy Bᵀ` are one
kernel (shrink), `y += v B` and `dx += u A` another (expand), `dA += uᵀ x` and `dB += vᵀ dy` the third. The
scale is applied in shrink and nowhere else.

Common arguments: `weights, offsets, ranks, scales` address a weight matrix [rank, width] as in `LoraTable`;
`tiles` [.., 3] holds `(slot, start, num_rows)` with `start` into `token_idx`; `m0..m2` are the modules of the
group and `c0..c2` the widths of the wide axis. SHARED says that all modules use the same columns of the wide
matrix (x, dx); otherwise their columns stand side by side from `first_column` (y, dy). Wide matrices are
indexed by `token_idx`. Tiles and segments without rows are padding and end at once.

The rank-wide scratch is float32 [SPLITS, positions, rank columns], indexed by position in `token_idx`, with
module i at column `i * rank_stride`. A batch with few tiles would leave most of the device idle, so its sum
over the wide axis is split: each part is a plane of its own, and whoever reads adds the planes, in order. Of
a row the columns up to the next multiple of 16 ranks are written (zeros past the true rank), so that reading
it needs no mask finer than a vector.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

MAX_GROUP = 3
"""Modules that one launch can serve."""

_STATIC = ["layer", "num_layers", "num_modules", "m0", "m1", "m2"]


@triton.jit
def _pick(i, a, b, c):
    """The i-th of three scalars."""
    return tl.where(i == 0, a, tl.where(i == 1, b, c))


@triton.jit
def _first_column(i, first_column, c0, c1, SHARED: tl.constexpr):
    """Where module i's columns begin in the wide matrix."""
    return first_column if SHARED else first_column + tl.where(i > 0, c0, 0) + tl.where(i > 1, c1, 0)


@triton.jit
def _padded(rank):
    """The rank rounded up to whole vectors of scratch."""
    return (rank + 15) // 16 * 16


@triton.jit
def _module_of_block(block, c0, c1, BLOCK_C: tl.constexpr):
    """Module and column block of it, where the blocks of all modules are numbered through."""
    blocks_0 = tl.cdiv(c0, BLOCK_C)
    blocks_1 = tl.cdiv(c1, BLOCK_C)
    i = (block >= blocks_0).to(tl.int32) + (block >= blocks_0 + blocks_1).to(tl.int32)
    before = tl.where(i > 0, blocks_0, 0) + tl.where(i > 1, blocks_1, 0)
    return i, block - before


@triton.jit
def _sum_splits(rows, split_stride, columns, mask, SPLITS: tl.constexpr, dtype: tl.constexpr):
    """The tile of scratch at `rows[:, None] + columns[None, :]`, its planes added in order."""
    total = tl.load(rows + columns, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(rows + split * split_stride + columns, mask=mask, other=0.0)
    return total.to(dtype)


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _dropout_scale(p, keys, layer, module, columns):
    """Multiplier [rows, columns] of `dropout_mask`: 0 where dropped, 1/(1-p) where kept."""
    low = (keys & 0xFFFFFFFF).to(tl.uint32)
    high = ((keys >> 32) & 0xFFFFFFFF).to(tl.uint32)
    site = (layer * 64 + module + 1).to(tl.uint32) * 0x9E3779B9
    seed = _mix(low + site)
    twist = _mix(high ^ seed)
    bits = (columns.to(tl.uint32) * 0x9E3779B9)[None, :] + seed[:, None]
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = bits ^ twist[:, None]
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    bits = bits ^ (bits >> 16)
    uniform = (bits >> 8).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)
    keep = uniform >= p[:, None]
    return tl.where(keep, (1.0 / (1.0 - p))[:, None], 0.0)


@triton.jit
def _drop(values, scale, dtype: tl.constexpr):
    """`values` times the multiplier in float32; exactly 0 where dropped, whatever the value."""
    return tl.where(scale != 0.0, values.to(tl.float32) * scale, 0.0).to(dtype)


@triton.jit(do_not_specialize=[*_STATIC, "num_rank_blocks"])
def shrink_kernel(
    x,
    x_stride,
    first_column,
    out,
    out_stride,
    split_stride,
    rank_stride,
    weights,
    offsets,
    ranks,
    scales,
    p,
    keys,
    layer,
    num_layers,
    num_modules,
    tiles,
    token_idx,
    m0,
    m1,
    m2,
    c0,
    c1,
    c2,
    num_rank_blocks,
    split_columns,
    SHARED: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`out[split, position, r] = s · Σ_c drop(x)[row, c] W[r, c]` over the split's `split_columns` columns.

    A program owns one tile of rows of one adapter, one module, BLOCK_R ranks, one split. Accumulates in
    float32.
    """
    tile = tl.program_id(0)
    i = tl.program_id(1) // num_rank_blocks
    rank_block = tl.program_id(1) % num_rank_blocks
    split = tl.program_id(2)
    slot = tl.load(tiles + tile * 3)
    start = tl.load(tiles + tile * 3 + 1)
    num_rows = tl.load(tiles + tile * 3 + 2)
    module = _pick(i, m0, m1, m2)
    site = (slot * num_layers + layer) * num_modules + module
    rank = tl.load(ranks + site)
    if (num_rows > 0) & (rank_block * BLOCK_R < rank):
        width = c0 if SHARED else _pick(i, c0, c1, c2)
        column = _first_column(i, first_column, c0, c1, SHARED)
        offset = tl.multiple_of(tl.load(offsets + site), 16)
        m = tl.arange(0, BLOCK_M)
        r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
        c = tl.arange(0, BLOCK_C)
        row_mask = m < num_rows
        rank_mask = r < rank
        rows = tl.load(token_idx + start + m, mask=row_mask, other=0)
        x_rows = x + rows[:, None] * x_stride + column
        w_rows = weights + offset + r.to(tl.int64)[:, None] * width
        if DROPOUT:
            row_p = tl.load(p + rows, mask=row_mask, other=0.0)
            row_keys = tl.load(keys + rows, mask=row_mask, other=0)
        acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for k in range(split * split_columns, tl.minimum(width, (split + 1) * split_columns), BLOCK_C):
            column_mask = k + c < width
            x_mask = row_mask[:, None] & column_mask[None, :]
            w_mask = rank_mask[:, None] & column_mask[None, :]
            x_tile = tl.load(x_rows + (k + c)[None, :], mask=x_mask, other=0.0)
            w_tile = tl.load(w_rows + (k + c)[None, :], mask=w_mask, other=0.0)
            if DROPOUT:
                scale = _dropout_scale(row_p, row_keys, layer, module, k + c)
                x_tile = _drop(x_tile, scale, x.dtype.element_ty)
            acc += tl.dot(x_tile, tl.trans(w_tile.to(x.dtype.element_ty)), input_precision="ieee")
        acc = acc * tl.load(scales + site)
        plane = out + split.to(tl.int64) * split_stride
        out_rows = plane + (start + m).to(tl.int64)[:, None] * out_stride + i * rank_stride
        out_mask = row_mask[:, None] & (r < _padded(rank))[None, :]
        tl.store(out_rows + r[None, :], acc, mask=out_mask)


@triton.jit(do_not_specialize=[*_STATIC, "group_size"])
def expand_kernel(
    v,
    v_stride,
    split_stride,
    rank_stride,
    out,
    out_stride,
    first_column,
    weights,
    offsets,
    ranks,
    p,
    keys,
    layer,
    num_layers,
    num_modules,
    tiles,
    token_idx,
    m0,
    m1,
    m2,
    c0,
    c1,
    c2,
    group_size,
    SHARED: tl.constexpr,
    DROPOUT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`out[row, c] += mask · Σ_r v[position, r] W[r, c]`.

    A program owns one tile of rows of one adapter and BLOCK_C columns: of one module, or with SHARED of the
    sum over all modules of the group. Loops over the true rank; accumulates in float32; rows belong to one
    program, so the read-modify-write needs no atomics.
    """
    tile = tl.program_id(0)
    slot = tl.load(tiles + tile * 3)
    start = tl.load(tiles + tile * 3 + 1)
    num_rows = tl.load(tiles + tile * 3 + 2)
    if SHARED:
        i_begin = 0
        block = tl.program_id(1)
        i_end = group_size
    else:
        i_begin, block = _module_of_block(tl.program_id(1), c0, c1, BLOCK_C)
        i_end = i_begin + 1
    i_end = tl.where(num_rows > 0, i_end, i_begin)
    width = c0 if SHARED else _pick(i_begin, c0, c1, c2)
    column = _first_column(i_begin, first_column, c0, c1, SHARED)
    m = tl.arange(0, BLOCK_M)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    row_mask = m < num_rows
    column_mask = c < width
    rows = tl.load(token_idx + start + m, mask=row_mask, other=0)
    v_rows = v + (start + m).to(tl.int64)[:, None] * v_stride
    if DROPOUT:
        row_p = tl.load(p + rows, mask=row_mask, other=0.0)
        row_keys = tl.load(keys + rows, mask=row_mask, other=0)
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    num_ranks = 0
    for i in range(i_begin, i_end):
        module = _pick(i, m0, m1, m2)
        site = (slot * num_layers + layer) * num_modules + module
        rank = tl.load(ranks + site)
        num_ranks += rank
        offset = tl.multiple_of(tl.load(offsets + site), 16)
        acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        for r0 in range(0, rank, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            v_mask = row_mask[:, None] & (r < _padded(rank))[None, :]
            w_mask = (r < rank)[:, None] & column_mask[None, :]
            w_rows = weights + offset + r.to(tl.int64)[:, None] * width
            w_tile = tl.load(w_rows + c[None, :], mask=w_mask, other=0.0)
            ranks_of_module = (i * rank_stride + r)[None, :]
            v_tile = _sum_splits(v_rows, split_stride, ranks_of_module, v_mask, SPLITS, out.dtype.element_ty)
            acc += tl.dot(v_tile, w_tile.to(out.dtype.element_ty), input_precision="ieee")
        if DROPOUT:
            acc = _drop(acc, _dropout_scale(row_p, row_keys, layer, module, c), tl.float32)
        total += acc
    if num_ranks > 0:
        mask = row_mask[:, None] & column_mask[None, :]
        out_tile = out + rows[:, None] * out_stride + column + c[None, :]
        total += tl.load(out_tile, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_tile, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*_STATIC, "num_rank_blocks"])
def weight_grad_kernel(
    left,
    left_stride,
    split_stride,
    rank_stride,
    right,
    right_stride,
    first_column,
    grads,
    base,
    offsets,
    ranks,
    p,
    keys,
    layer,
    num_layers,
    num_modules,
    segments,
    token_idx,
    m0,
    m1,
    m2,
    c0,
    c1,
    c2,
    num_rank_blocks,
    SHARED: tl.constexpr,
    DROPOUT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`grad[r, c] += Σ_rows left[position, r] · drop(right)[row, c]`, accumulated in float32.

    A program owns BLOCK_R × BLOCK_C of one adapter's gradient of one module and walks all rows of that
    adapter in order: deterministic, no atomics. `grads` holds one address per segment; 0 skips a frozen
    adapter.
    """
    segment = tl.program_id(0)
    if SHARED:
        i = tl.program_id(2) // num_rank_blocks
        block = tl.program_id(1)
    else:
        i, block = _module_of_block(tl.program_id(1), c0, c1, BLOCK_C)
    rank_block = tl.program_id(2) % num_rank_blocks
    slot = tl.load(segments + segment * 3)
    start = tl.load(segments + segment * 3 + 1)
    num_rows = tl.load(segments + segment * 3 + 2)
    module = _pick(i, m0, m1, m2)
    site = (slot * num_layers + layer) * num_modules + module
    rank = tl.load(ranks + site)
    address = tl.load(grads + segment)
    width = c0 if SHARED else _pick(i, c0, c1, c2)
    if (address != 0) & (rank_block * BLOCK_R < rank):
        column = _first_column(i, first_column, c0, c1, SHARED)
        offset = tl.multiple_of(tl.load(offsets + site) - tl.load(base + slot), 16)
        grad = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16) + offset
        r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        rank_mask = r < rank
        column_mask = c < width
        acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        for first in range(0, num_rows, BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            row_mask = m < num_rows
            rows = tl.load(token_idx + start + m, mask=row_mask, other=0)
            left_tile = _sum_splits(
                left + (start + m).to(tl.int64)[:, None] * left_stride,
                split_stride,
                (i * rank_stride + r)[None, :],
                row_mask[:, None] & (r < _padded(rank))[None, :],
                SPLITS,
                right.dtype.element_ty,
            )
            right_tile = tl.load(
                right + rows[:, None] * right_stride + column + c[None, :],
                mask=row_mask[:, None] & column_mask[None, :],
                other=0.0,
            )
            if DROPOUT:
                row_p = tl.load(p + rows, mask=row_mask, other=0.0)
                row_keys = tl.load(keys + rows, mask=row_mask, other=0)
                scale = _dropout_scale(row_p, row_keys, layer, module, c)
                right_tile = _drop(right_tile, scale, right.dtype.element_ty)
            acc += tl.dot(tl.trans(left_tile), right_tile, input_precision="ieee")
        grad_tile = grad + r.to(tl.int64)[:, None] * width + c[None, :]
        mask = rank_mask[:, None] & column_mask[None, :]
        tl.store(grad_tile, tl.load(grad_tile, mask=mask, other=0.0) + acc, mask=mask)
