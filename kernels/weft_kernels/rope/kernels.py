"""The Triton kernels of the rotary embedding: unchecked device code; `fused.py` launches it.

A program owns HEADS heads of one row, all of one kind: queries, keys or values (HEADS divides the number of
each). float32 inside, rounded once. HALF is half a head, BLOCK the power of two that holds it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _half(heads, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Addresses and mask of the first half of HEADS heads."""
    c = tl.arange(0, BLOCK)
    head = tl.arange(0, HEADS)
    return heads + head[:, None] * (2 * HALF) + c[None, :], (c < HALF)[None, :] & (head >= 0)[:, None]


@triton.jit
def _load(heads, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Both halves of HEADS heads, float32."""
    first, mask = _half(heads, HEADS, HALF, BLOCK)
    return (
        tl.load(first, mask=mask, other=0.0).to(tl.float32),
        tl.load(first + HALF, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def _store(heads, a, b, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    first, mask = _half(heads, HEADS, HALF, BLOCK)
    tl.store(first, a.to(heads.dtype.element_ty), mask=mask)
    tl.store(first + HALF, b.to(heads.dtype.element_ty), mask=mask)


@triton.jit
def _row(values, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """HALF values, float32, to broadcast over heads: `[1, BLOCK]`."""
    c = tl.arange(0, BLOCK)
    return tl.load(values + c, mask=c < HALF, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _angles(cos, sin, row, HALF: tl.constexpr, BLOCK: tl.constexpr):
    at = row * (2 * HALF)
    return _row(cos + at, HALF, BLOCK), _row(sin + at, HALF, BLOCK)


@triton.jit
def _inverse(a, b, eps, HALF: tl.constexpr):
    """`1 / sqrt(mean(x²) + eps)` of every head, `[HEADS, 1]`."""
    return tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * HALF) + eps)[:, None]


@triton.jit
def rotate_kernel(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    eps,
    q,
    k_cache,
    v_cache,
    slots,
    num_heads,
    num_kv_heads,
    HAS_NORM: tl.constexpr,
    WRITES: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norm and rotate query and key heads; queries go to `q`, keys and values to their slots of the cache,
    unless the row's slot is negative.

    Without WRITES there is no cache, and programs of query heads alone are launched.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS
    width = (num_heads + 2 * num_kv_heads) * (2 * HALF)
    a, b = _load(qkv + row * width + head * (2 * HALF), HEADS, HALF, BLOCK)
    if head < num_heads + num_kv_heads:
        if HAS_NORM:
            weight = q_norm if head < num_heads else k_norm
            w_a = _row(weight, HALF, BLOCK)
            w_b = _row(weight + HALF, HALF, BLOCK)
            inverse = _inverse(a, b, eps, HALF)
            a = a * inverse * w_a
            b = b * inverse * w_b
        c, s = _angles(cos, sin, row, HALF, BLOCK)
        out_a = a * c - b * s
        out_b = b * c + a * s
        if head < num_heads:
            _store(q + (row * num_heads + head) * (2 * HALF), out_a, out_b, HEADS, HALF, BLOCK)
        elif WRITES:
            slot = tl.load(slots + row)
            if slot >= 0:
                at = (slot * num_kv_heads + head - num_heads) * (2 * HALF)
                _store(k_cache + at, out_a, out_b, HEADS, HALF, BLOCK)
    elif WRITES:
        slot = tl.load(slots + row)
        if slot >= 0:
            at = (slot * num_kv_heads + head - num_heads - num_kv_heads) * (2 * HALF)
            _store(v_cache + at, a, b, HEADS, HALF, BLOCK)


@triton.jit
def rotate_backward_kernel(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    eps,
    d_q,
    d_k,
    d_v,
    d_qkv,
    num_heads,
    num_kv_heads,
    HAS_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotate cotangents of query and key heads back, and through the norm; those of values are copied."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS
    at = row * (num_heads + 2 * num_kv_heads) * (2 * HALF) + head * (2 * HALF)
    kv_row = row * num_kv_heads
    if head < num_heads:
        a, b = _load(d_q + (row * num_heads + head) * (2 * HALF), HEADS, HALF, BLOCK)
    elif head < num_heads + num_kv_heads:
        a, b = _load(d_k + (kv_row + head - num_heads) * (2 * HALF), HEADS, HALF, BLOCK)
    else:
        a, b = _load(d_v + (kv_row + head - num_heads - num_kv_heads) * (2 * HALF), HEADS, HALF, BLOCK)
    if head < num_heads + num_kv_heads:
        c, s = _angles(cos, sin, row, HALF, BLOCK)
        d_a = a * c + b * s
        d_b = b * c - a * s
        if HAS_NORM:
            weight = q_norm if head < num_heads else k_norm
            w_a = _row(weight, HALF, BLOCK)
            w_b = _row(weight + HALF, HALF, BLOCK)
            x_a, x_b = _load(qkv + at, HEADS, HALF, BLOCK)
            inverse = _inverse(x_a, x_b, eps, HALF)
            x_a *= inverse
            x_b *= inverse
            d_a *= w_a
            d_b *= w_b
            mean = (tl.sum(d_a * x_a + d_b * x_b, axis=1) / (2 * HALF))[:, None]
            d_a = inverse * (d_a - x_a * mean)
            d_b = inverse * (d_b - x_b * mean)
        a = d_a
        b = d_b
    _store(d_qkv + at, a, b, HEADS, HALF, BLOCK)
