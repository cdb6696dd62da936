"""The Triton kernels of paged attention: decode rows in parts of their keys, chunks, and their backward.

Unchecked device code; `fused.py` launches it. The algorithms are FlashAttention-2 (Dao 2023: online softmax,
one pass over the keys per tile of queries; a backward that recomputes the weights from the log-sum-exp) and
Flash-Decoding (Dao et al. 2023: the keys of a decode row are split over programs, and a second kernel
combines the parts by their log-sum-exp). The score matrix is never stored.

The `GROUP` query heads that share a key head are computed by one program, so that keys and values are read
once for all of them: a tile of queries is `[tokens · GROUP, D]`, its row `r` is token `r // GROUP` and head
`r % GROUP` of the group. Products are in the inputs' type with fp32 accumulation, softmax in fp32, to base 2.

Common arguments: `k_cache, v_cache` `[num_blocks, BLOCK_SIZE, Hkv, D]` contiguous; `rows` `[·, 5]` of
`(num_keys, block_start, first_part, num_parts, part_keys)` and `parts` `[·, 2]` of `(row, part)` as in
`DecodeTables`; `chunks` `[·, 5]` of
`(row_start, num_tokens, num_keys, key_offset, block_start)` and `tiles` `[·, 2]` of `(chunk, first)` as in
`ChunkTables`; `window`: a row at position p sees keys in `(p - window, p]`. Keys at and past a sequence's end
are never read, whatever is there.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

_STATIC = ["num_kv_heads", "window"]
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _slots(block_ids, positions, mask, BLOCK_SIZE: tl.constexpr):
    """Cache rows of a sequence's tokens, 64 bits."""
    blocks = tl.load(block_ids + positions // BLOCK_SIZE, mask=mask, other=0)
    return blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def _online_softmax(scores, acc, maximum, total, values):
    """One step over the keys: rescale what was accumulated to the new maximum, then add."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # A row may have seen no key yet: minus infinity less minus infinity must not become NaN.
    reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores - reference[:, None])
    decay = tl.exp2(maximum - reference)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    acc += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return acc, new_maximum, total


@triton.jit(do_not_specialize=_STATIC)
def decode_kernel(
    q,
    q_stride,
    k_cache,
    v_cache,
    out,
    partial,
    partial_lse,
    rows,
    parts,
    block_ids,
    num_kv_heads,
    scale_log2,
    window,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`out[row, head] = softmax(scale · q kᵀ) v` over a part of the row's keys.

    A program owns one part of one row, and one key head with its query heads. With SPLIT, the output of a
    part that is not its row's only one goes to `partial` `[P, H, D]` fp32 and its log2-sum-exp2 to
    `partial_lse`.
    """
    place = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    row = tl.load(parts + place * 2).to(tl.int64)
    part = tl.load(parts + place * 2 + 1)
    entry = rows + tl.maximum(row, 0) * 5
    length = tl.where(row < 0, 0, tl.load(entry))
    part_keys = tl.load(entry + 4)
    begin = tl.maximum(length - window, 0) + part * part_keys
    end = tl.minimum(begin + part_keys, length)
    if begin < end:
        row_blocks = block_ids + tl.load(entry + 1)
        g = tl.arange(0, BLOCK_G)
        d = tl.arange(0, BLOCK_D)
        n = tl.arange(0, BLOCK_N)
        head_mask = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
        heads = h * GROUP + g
        q_tile = tl.load(
            q + row * q_stride + heads[:, None] * HEAD_DIM + d[None, :], mask=head_mask, other=0.0
        )
        acc = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
        maximum = tl.full((BLOCK_G,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_G,), dtype=tl.float32)
        for first in range(begin, end, BLOCK_N):
            keys = first + n
            key_mask = keys < end
            slots = _slots(row_blocks, keys, key_mask, BLOCK_SIZE)
            offsets = (slots * num_kv_heads + h)[:, None] * HEAD_DIM + d[None, :]
            mask = key_mask[:, None] & (d < HEAD_DIM)[None, :]
            k = tl.load(k_cache + offsets, mask=mask, other=0.0)
            v = tl.load(v_cache + offsets, mask=mask, other=0.0)
            scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * scale_log2
            scores = tl.where(key_mask[None, :], scores, float("-inf"))
            acc, maximum, total = _online_softmax(scores, acc, maximum, total, v)
        acc = acc / total[:, None]
        is_part = False
        if SPLIT:
            is_part = tl.load(entry + 3) > 1
        if is_part:
            places = place * num_kv_heads * GROUP + heads
            tl.store(partial + places[:, None] * HEAD_DIM + d[None, :], acc, mask=head_mask)
            tl.store(partial_lse + places, maximum + tl.log2(total), mask=g < GROUP)
        else:
            places = row * num_kv_heads * GROUP + heads
            tl.store(
                out + places[:, None] * HEAD_DIM + d[None, :], acc.to(out.dtype.element_ty), mask=head_mask
            )


@triton.jit(do_not_specialize=["num_heads", "window"])
def combine_kernel(
    partial,
    partial_lse,
    out,
    rows,
    num_heads,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`out[row, head] = Σ_i w_i partial_i`, with `w = softmax(log-sum-exp)` over the row's parts.

    A program owns one row and head; a row of one part has its output already. Parts that the window has left
    behind were not written and are not read.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(rows + row * 5 + 3) > 1:
        length = tl.load(rows + row * 5)
        first_part = tl.load(rows + row * 5 + 2).to(tl.int64)
        part_keys = tl.load(rows + row * 5 + 4)
        s = tl.arange(0, BLOCK_S)
        d = tl.arange(0, BLOCK_D)
        own = s * part_keys < tl.minimum(length, window)
        places = (first_part + s) * num_heads + tl.program_id(1)
        lse = tl.load(partial_lse + places, mask=own, other=float("-inf"))
        weights = tl.exp2(lse - tl.max(lse, 0))
        mask = own[:, None] & (d < HEAD_DIM)[None, :]
        parts = tl.load(partial + places[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
        combined = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
        at = (row * num_heads + tl.program_id(1)) * HEAD_DIM + d
        tl.store(out + at, combined.to(out.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit
def _chunk_step(
    q_tile,
    acc,
    maximum,
    total,
    first,
    end,
    positions,
    k_cache,
    v_cache,
    block_ids,
    key_offset,
    num_kv_heads,
    h,
    scale_log2,
    window,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of keys of a chunk; not MASKED where all rows see all of them."""
    d = tl.arange(0, BLOCK_D)
    keys = first + tl.arange(0, BLOCK_N)
    key_mask = keys < end
    slots = _slots(block_ids, key_offset + keys, key_mask, BLOCK_SIZE)
    offsets = (slots * num_kv_heads + h)[:, None] * HEAD_DIM + d[None, :]
    mask = key_mask[:, None] & (d < HEAD_DIM)[None, :]
    k = tl.load(k_cache + offsets, mask=mask, other=0.0)
    v = tl.load(v_cache + offsets, mask=mask, other=0.0)
    scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * scale_log2
    if MASKED:
        distance = positions[:, None] - keys[None, :]
        scores = tl.where((distance >= 0) & (distance < window), scores, float("-inf"))
    return _online_softmax(scores, acc, maximum, total, v)


@triton.jit(do_not_specialize=_STATIC)
def chunk_kernel(
    q,
    q_stride,
    k_cache,
    v_cache,
    out,
    lse,
    chunks,
    tiles,
    block_ids,
    num_kv_heads,
    scale_log2,
    window,
    SAVED: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`out = softmax(scale · q kᵀ) v` of a tile of queries; with SAVED also `lse` `[T, H]`, natural, fp32.

    A program owns one tile of a chunk's tokens and one key head with its query heads.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    chunk = tl.load(tiles + tl.program_id(0) * 2)
    first_token = tl.load(tiles + tl.program_id(0) * 2 + 1)
    h = tl.program_id(1)
    if chunk >= 0:
        row_start = tl.load(chunks + chunk * 5)
        num_tokens = tl.load(chunks + chunk * 5 + 1)
        num_keys = tl.load(chunks + chunk * 5 + 2)
        key_offset = tl.load(chunks + chunk * 5 + 3)
        blocks = block_ids + tl.load(chunks + chunk * 5 + 4)
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        tokens = first_token + m // GROUP
        heads = h * GROUP + m % GROUP
        row_mask = (m < TOKENS * GROUP) & (tokens < num_tokens)
        mask = row_mask[:, None] & (d < HEAD_DIM)[None, :]
        rows = (row_start + tokens).to(tl.int64)
        q_tile = tl.load(
            q + rows[:, None] * q_stride + heads[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0
        )
        positions = num_keys - num_tokens + tokens
        first_position = num_keys - num_tokens + first_token
        end = tl.minimum(first_position + TOKENS, num_keys)
        begin = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
        # Keys below are seen by all rows, unless the window has left some of them behind.
        full_end = tl.where(window > end, (first_position + 1) // BLOCK_N * BLOCK_N, begin)
        acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        maximum = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for first in range(begin, full_end, BLOCK_N):
            acc, maximum, total = _chunk_step(
                *(q_tile, acc, maximum, total, first, end, positions, k_cache, v_cache, blocks, key_offset),
                *(num_kv_heads, h, scale_log2, window, False, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D),
            )
        for first in range(full_end, end, BLOCK_N):
            acc, maximum, total = _chunk_step(
                *(q_tile, acc, maximum, total, first, end, positions, k_cache, v_cache, blocks, key_offset),
                *(num_kv_heads, h, scale_log2, window, True, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D),
            )
        total = tl.where(row_mask, total, 1.0)
        acc = acc / total[:, None]
        places = rows * num_kv_heads * GROUP + heads
        if SAVED:
            tl.store(lse + places, (maximum + tl.log2(total)) * _LN_2, mask=row_mask)
        tl.store(out + places[:, None] * HEAD_DIM + d[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_STATIC)
def query_grad_kernel(
    q,
    q_stride,
    k_cache,
    v_cache,
    out,
    d_out,
    lse,
    delta,
    d_q,
    chunks,
    tiles,
    block_ids,
    num_kv_heads,
    scale,
    window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`dq = scale · dS k` with `dS = P · (dO vᵀ - δ)`, `P` from the log-sum-exp and `δ = Σ_d dO · O`, which
    goes to `delta` `[T, H]` fp32 for the other kernel.

    A program owns one tile of a chunk's tokens and one key head with its query heads, and walks its keys.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    chunk = tl.load(tiles + tl.program_id(0) * 2)
    first_token = tl.load(tiles + tl.program_id(0) * 2 + 1)
    h = tl.program_id(1)
    if chunk >= 0:
        row_start = tl.load(chunks + chunk * 5)
        num_tokens = tl.load(chunks + chunk * 5 + 1)
        num_keys = tl.load(chunks + chunk * 5 + 2)
        key_offset = tl.load(chunks + chunk * 5 + 3)
        blocks = block_ids + tl.load(chunks + chunk * 5 + 4)
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        n = tl.arange(0, BLOCK_N)
        tokens = first_token + m // GROUP
        heads = h * GROUP + m % GROUP
        row_mask = (m < TOKENS * GROUP) & (tokens < num_tokens)
        mask = row_mask[:, None] & (d < HEAD_DIM)[None, :]
        rows = (row_start + tokens).to(tl.int64)
        places = rows * num_kv_heads * GROUP + heads
        offsets = places[:, None] * HEAD_DIM + d[None, :]
        q_tile = tl.load(
            q + rows[:, None] * q_stride + heads[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0
        )
        d_out_tile = tl.load(d_out + offsets, mask=mask, other=0.0)
        out_tile = tl.load(out + offsets, mask=mask, other=0.0)
        row_delta = tl.sum(d_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
        tl.store(delta + places, row_delta, mask=row_mask)
        row_lse = tl.load(lse + places, mask=row_mask, other=0.0) / _LN_2
        scale_log2 = scale / _LN_2
        positions = num_keys - num_tokens + tokens
        first_position = num_keys - num_tokens + first_token
        end = tl.minimum(first_position + TOKENS, num_keys)
        begin = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        for first in range(begin, end, BLOCK_N):
            keys = first + n
            key_mask = keys < end
            slots = _slots(blocks, key_offset + keys, key_mask, BLOCK_SIZE)
            key_offsets = (slots * num_kv_heads + h)[:, None] * HEAD_DIM + d[None, :]
            tile_mask = key_mask[:, None] & (d < HEAD_DIM)[None, :]
            k = tl.load(k_cache + key_offsets, mask=tile_mask, other=0.0)
            v = tl.load(v_cache + key_offsets, mask=tile_mask, other=0.0)
            scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * scale_log2
            distance = positions[:, None] - keys[None, :]
            weights = tl.exp2(scores - row_lse[:, None])
            weights = tl.where((distance >= 0) & (distance < window), weights, 0.0)
            d_weights = tl.dot(d_out_tile, tl.trans(v), input_precision="ieee")
            d_scores = weights * (d_weights - row_delta[:, None])
            acc += tl.dot(d_scores.to(k.dtype), k, input_precision="ieee")
        tl.store(d_q + offsets, (acc * scale).to(d_q.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_STATIC)
def key_grad_kernel(
    q,
    q_stride,
    k_cache,
    v_cache,
    d_out,
    lse,
    delta,
    targets,
    chunks,
    tiles,
    block_ids,
    num_kv_heads,
    scale,
    window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`dk += scale · dSᵀ q` and `dv += Pᵀ dO`, in fp32 at the addresses in `targets` `[C, 2]` (of the chunk's
    first key).

    A program owns one tile of a chunk's keys and one key head, and walks the tokens that see any of them in
    order: what it adds to is its own, so there are no atomics and the result is the same every time.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    chunk = tl.load(tiles + tl.program_id(0) * 2)
    first_key = tl.load(tiles + tl.program_id(0) * 2 + 1)
    h = tl.program_id(1)
    if chunk >= 0:
        row_start = tl.load(chunks + chunk * 5)
        num_tokens = tl.load(chunks + chunk * 5 + 1)
        num_keys = tl.load(chunks + chunk * 5 + 2)
        key_offset = tl.load(chunks + chunk * 5 + 3)
        blocks = block_ids + tl.load(chunks + chunk * 5 + 4)
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        keys = first_key + tl.arange(0, BLOCK_N)
        key_mask = keys < num_keys
        tile_mask = key_mask[:, None] & (d < HEAD_DIM)[None, :]
        slots = _slots(blocks, key_offset + keys, key_mask, BLOCK_SIZE)
        key_offsets = (slots * num_kv_heads + h)[:, None] * HEAD_DIM + d[None, :]
        k = tl.load(k_cache + key_offsets, mask=tile_mask, other=0.0)
        v = tl.load(v_cache + key_offsets, mask=tile_mask, other=0.0)
        scale_log2 = scale / _LN_2
        earlier = num_keys - num_tokens
        begin = tl.maximum(first_key - earlier, 0)
        end = tl.minimum(first_key + BLOCK_N - 1 - earlier + window, num_tokens)
        d_k = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        d_v = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        for first in range(begin, end, TOKENS):
            tokens = first + m // GROUP
            heads = h * GROUP + m % GROUP
            row_mask = (m < TOKENS * GROUP) & (tokens < num_tokens)
            mask = row_mask[:, None] & (d < HEAD_DIM)[None, :]
            rows = (row_start + tokens).to(tl.int64)
            places = rows * num_kv_heads * GROUP + heads
            q_tile = tl.load(
                q + rows[:, None] * q_stride + heads[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0
            )
            d_out_tile = tl.load(d_out + places[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
            row_lse = tl.load(lse + places, mask=row_mask, other=0.0) / _LN_2
            row_delta = tl.load(delta + places, mask=row_mask, other=0.0)
            scores = tl.dot(k, tl.trans(q_tile), input_precision="ieee") * scale_log2
            distance = (earlier + tokens)[None, :] - keys[:, None]
            visible = (distance >= 0) & (distance < window) & row_mask[None, :]
            weights = tl.where(visible, tl.exp2(scores - row_lse[None, :]), 0.0)
            d_v += tl.dot(weights.to(q_tile.dtype), d_out_tile, input_precision="ieee")
            d_weights = tl.dot(v, tl.trans(d_out_tile), input_precision="ieee")
            d_scores = weights * (d_weights - row_delta[None, :])
            d_k += tl.dot(d_scores.to(q_tile.dtype), q_tile, input_precision="ieee")
        offsets = (keys.to(tl.int64) * num_kv_heads + h)[:, None] * HEAD_DIM + d[None, :]
        d_k_rows = tl.multiple_of(tl.load(targets + chunk * 2).to(tl.pointer_type(tl.float32)), 16) + offsets
        d_v_rows = (
            tl.multiple_of(tl.load(targets + chunk * 2 + 1).to(tl.pointer_type(tl.float32)), 16) + offsets
        )
        tl.store(d_k_rows, tl.load(d_k_rows, mask=tile_mask, other=0.0) + d_k * scale, mask=tile_mask)
        tl.store(d_v_rows, tl.load(d_v_rows, mask=tile_mask, other=0.0) + d_v, mask=tile_mask)
