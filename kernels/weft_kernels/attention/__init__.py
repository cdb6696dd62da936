"""Attention over a paged key/value cache, forward and backward.

    out_i = Σ_j softmax_j(scale · q_i·k_j) v_j      over the keys j that row i may see

The cache of one layer is `[num_blocks, block_size, Hkv, D]` for keys and the same for values; query heads are
grouped (`H` a multiple of `Hkv`). Softmax is accumulated in fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from torch import Tensor

from weft_kernels.attention import reference
from weft_kernels.attention.batch import AttentionBatch, AttentionChunk, make_chunk
from weft_kernels.attention.decode import DecodeBucket, make_buckets
from weft_kernels.attention.reference import Vjp, gather_keys

__all__ = [
    "AttentionBatch",
    "AttentionChunk",
    "DecodeBucket",
    "Vjp",
    "chunk_vjp",
    "gather_keys",
    "make_buckets",
    "make_chunk",
    "paged_attention",
]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention of a flat batch over the cache; the batch's own keys must already be written.

    Args:
        q: `[T, H, D]`.
        k_cache: `[num_blocks, block_size, Hkv, D]`; `v_cache` alike.
        batch: which rows see which keys; its rows cover `[0, T)`.
        scale: factor of the scores.
        sliding_window: number of latest keys that a row sees (its own included); None means all.

    Returns:
        `[T, H, D]` in the dtype of `q`.

    Raises:
        ValueError: head counts or dtypes that do not fit.
    """
    _check(q, k_cache, v_cache)
    return reference.paged_attention(q, k_cache, v_cache, batch, scale=scale, sliding_window=sliding_window)


def chunk_vjp(
    q: Tensor, k: Tensor, v: Tensor, chunk: AttentionChunk, *, scale: float, sliding_window: int | None = None
) -> tuple[Tensor, Vjp]:
    """One chunk's attention, and the function that differentiates it once.

    Args:
        q: `[num_tokens, H, D]`.
        k: `[num_keys, Hkv, D]` as from `gather_keys`; `v` alike.
        chunk: only its sizes are read.

    Returns:
        The output `[num_tokens, H, D]`, and a function from its cotangent to `(d_q, d_k, d_v)`, the latter
        two over all keys of the chunk. The function may be called once; it keeps what it needs of the inputs
        alive.
    """
    return reference.chunk_vjp(q, k, v, chunk, scale=scale, sliding_window=sliding_window)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    if k_cache.shape != v_cache.shape or k_cache.dim() != 4:
        raise ValueError(
            f"key and value cache must both be [num_blocks, block_size, Hkv, D]; "
            f"got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if q.dim() != 3 or q.shape[2] != k_cache.shape[3] or q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"queries {tuple(q.shape)} do not fit a cache of {tuple(k_cache.shape)}")
    if q.dtype != k_cache.dtype:
        raise ValueError(f"queries are {q.dtype}, the cache is {k_cache.dtype}")
