"""Attention over a paged key/value cache, forward and backward.

    out_i = Σ_j softmax_j(scale · q_i·k_j) v_j      over the keys j that row i may see

The cache of one layer is `[num_blocks, block_size, Hkv, D]` for keys and the same for values; query heads are
grouped (`H` a multiple of `Hkv`). Softmax is accumulated in fp32 (fp64 for fp64 inputs). Here arguments are
checked; CUDA tensors go to the Triton kernels; all others, fp64, and heads wider than 128, to the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft_kernels.attention import reference
from weft_kernels.attention.batch import AttentionBatch, AttentionChunk, DecodeRow, make_chunk
from weft_kernels.attention.buffer import AttentionBuffer, AttentionRoom
from weft_kernels.attention.tables import LARGE_TILE, MAX_HEAD_DIM, SMALL_TILE, TableShape
from weft_kernels.attention.training import KeyTarget, SavedAttention

__all__ = [
    "LARGE_TILE",
    "AttentionBatch",
    "AttentionBuffer",
    "AttentionChunk",
    "AttentionRoom",
    "DecodeRow",
    "KeyTarget",
    "SavedAttention",
    "TableShape",
    "attention_backward",
    "has_kernels",
    "make_chunk",
    "paged_attention",
    "table_shape",
]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    """Attention of a flat batch over the cache; the batch's own keys must already be written.

    Args:
        q: `[T, H, D]`.
        k_cache: `[num_blocks, block_size, Hkv, D]`, contiguous; `v_cache` alike.
        batch: which rows see which keys; its rows cover `[0, T)`.
        scale: factor of the scores.
        sliding_window: number of latest keys that a row sees (its own included); None means all.
        stats: `[T, H]` fp32, contiguous; what `attention_backward` wants to know of the rows of chunks is
            written here. Its meaning is the implementation's.

    Returns:
        `[T, H, D]` in the dtype of `q`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(q, k_cache, v_cache, batch, stats)
    if _use_kernels(q, k_cache):
        from weft_kernels.attention import fused

        return fused.paged_attention(
            q, k_cache, v_cache, batch, scale=scale, sliding_window=sliding_window, stats=stats
        )
    return reference.paged_attention(
        q, k_cache, v_cache, batch, scale=scale, sliding_window=sliding_window, stats=stats
    )


def attention_backward(d_out: Tensor, saved: SavedAttention, targets: Sequence[KeyTarget]) -> Tensor:
    """Vector-Jacobian product of `paged_attention` of finetuning rows, deterministic.

    Args:
        d_out: cotangent of the output, `[T, H, D]` in its dtype.
        saved: of the forward; its keys and values must still be in the cache.
        targets: one for each chunk of the batch, in its order; what is there is added to. No two chunks of a
            batch may share accumulator rows.

    Returns:
        Cotangent of the queries, `[T, H, D]`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or decode rows.
    """
    _check_backward(d_out, saved, targets)
    if _use_kernels(saved.q, saved.k_cache):
        from weft_kernels.attention import fused

        return fused.attention_backward(d_out, saved, targets)
    return reference.attention_backward(d_out, saved, targets)


def has_kernels(dtype: torch.dtype, group: int, head_dim: int) -> bool:
    """Whether CUDA tensors with `group` query heads to a key head go to the Triton kernels."""
    return dtype != torch.float64 and group <= SMALL_TILE and head_dim <= MAX_HEAD_DIM


def table_shape(q: Tensor, k_cache: Tensor) -> TableShape:
    """What tables of batches of queries `[T, H, D]` over this cache are like, for an `AttentionBuffer`."""
    from weft_kernels.attention import fused

    return fused.table_shape(q, k_cache)


def _use_kernels(q: Tensor, k_cache: Tensor) -> bool:
    return q.is_cuda and has_kernels(q.dtype, q.shape[1] // k_cache.shape[2], q.shape[2])


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, stats: Tensor | None) -> None:
    if k_cache.shape != v_cache.shape or k_cache.dim() != 4:
        raise ValueError(
            f"key and value cache must both be [num_blocks, block_size, Hkv, D]; "
            f"got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("key and value cache must be contiguous")
    if q.dim() != 3 or q.shape[2] != k_cache.shape[3] or q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"queries {tuple(q.shape)} do not fit a cache of {tuple(k_cache.shape)}")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"queries are {q.dtype}, the cache is {k_cache.dtype} and {v_cache.dtype}")
    if q.shape[0] != batch.num_rows:
        raise ValueError(f"{q.shape[0]} queries, but the batch has {batch.num_rows} rows")
    if stats is not None and not _is_stats_of(q, stats):
        raise ValueError(f"statistics {tuple(stats.shape)} {stats.dtype} are no contiguous fp32 [T, H]")


def _is_stats_of(q: Tensor, stats: Tensor) -> bool:
    return stats.shape == q.shape[:2] and stats.dtype == torch.float32 and stats.is_contiguous()


def _check_backward(d_out: Tensor, saved: SavedAttention, targets: Sequence[KeyTarget]) -> None:
    if d_out.shape != saved.out.shape or d_out.dtype != saved.out.dtype:
        raise ValueError(
            f"the cotangent is {tuple(d_out.shape)} {d_out.dtype}, "
            f"the output {tuple(saved.out.shape)} {saved.out.dtype}"
        )
    if saved.batch.decode:
        raise ValueError(f"{len(saved.batch.decode)} decode rows in a batch that is to be differentiated")
    if saved.q.shape != saved.out.shape or not _is_stats_of(saved.q, saved.stats):
        raise ValueError(
            f"queries {tuple(saved.q.shape)}, output {tuple(saved.out.shape)} and statistics "
            f"{tuple(saved.stats.shape)} do not belong together"
        )
    chunks = saved.batch.chunks
    if len(targets) != len(chunks):
        raise ValueError(f"{len(targets)} targets for {len(chunks)} chunks")
    for target, chunk in zip(targets, chunks, strict=True):
        _check_target(target, chunk, saved)


def _check_target(target: KeyTarget, chunk: AttentionChunk, saved: SavedAttention) -> None:
    wide = saved.q.dtype.itemsize > 4
    for d in (target.d_k, target.d_v):
        if d.shape[1:] != saved.k_cache.shape[2:] or not d.is_contiguous():
            raise ValueError(f"accumulators must be contiguous [n, Hkv, D], got {tuple(d.shape)}")
        if d.dtype.itemsize < (8 if wide else 4):
            raise ValueError(f"accumulators of {saved.q.dtype} inputs may not be {d.dtype}")
        if target.first_key < 0 or target.first_key + chunk.num_keys > len(d):
            raise ValueError(
                f"keys [{target.first_key}, {target.first_key + chunk.num_keys}) of {len(d)} accumulators"
            )
