"""Paged attention in plain PyTorch: what every faster version must equal, and the CPU path.

Decode rows are one padded, masked call for all sequences of similar length; every chunk (a prompt chunk, or
the part of a finetuning window that lies in one example) is one call of the library's attention, which stores
no score matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels.attention.batch import AttentionBatch, AttentionChunk
from weft_kernels.attention.decode import DecodeBucket

Vjp: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention of a flat batch over cached keys and values; see `weft_kernels.attention.paged_attention`."""
    outputs = []
    if batch.decode:
        rows = q[: batch.num_decode]
        outputs.append(_decode(rows, k_cache, v_cache, batch.decode, scale, sliding_window))
    for chunk in batch.chunks:
        k, v = gather_keys(k_cache, v_cache, chunk)
        rows = q[chunk.row_start : chunk.row_start + chunk.num_tokens]
        outputs.append(_chunk(rows, k, v, chunk, scale, sliding_window))
    if not outputs:
        return torch.empty_like(q)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def chunk_vjp(
    q: Tensor, k: Tensor, v: Tensor, chunk: AttentionChunk, *, scale: float, sliding_window: int | None = None
) -> tuple[Tensor, Vjp]:
    """One chunk's attention and its backward; see `weft_kernels.attention.chunk_vjp`."""
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = _chunk(q, k, v, chunk, scale, sliding_window)

    def backward(d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_q, d_k, d_v = torch.autograd.grad(out, (q, k, v), d_out)
        return d_q, d_k, d_v

    return out.detach(), backward


def gather_keys(k_cache: Tensor, v_cache: Tensor, chunk: AttentionChunk) -> tuple[Tensor, Tensor]:
    """Keys and values of a chunk, contiguous: `[num_keys, Hkv, D]` each."""
    heads, head_dim = k_cache.shape[-2:]
    first, last = chunk.key_offset, chunk.key_offset + chunk.num_keys
    k = k_cache.index_select(0, chunk.block_ids).view(-1, heads, head_dim)[first:last]
    v = v_cache.index_select(0, chunk.block_ids).view(-1, heads, head_dim)[first:last]
    return k, v


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    buckets: Sequence[DecodeBucket],
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    if len(buckets) == 1:
        return _bucket(q, k_cache, v_cache, buckets[0], scale, sliding_window)
    out = torch.empty_like(q)
    for bucket in buckets:
        assert bucket.rows is not None  # buckets that are several name their rows
        rows = q.index_select(0, bucket.rows)
        out.index_copy_(0, bucket.rows, _bucket(rows, k_cache, v_cache, bucket, scale, sliding_window))
    return out


def _bucket(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    bucket: DecodeBucket,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    num_sequences, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    slots = bucket.slots(block_size).flatten()
    shape = (num_sequences, bucket.num_keys, num_kv_heads, head_dim)
    k = k_cache.flatten(0, 1).index_select(0, slots).view(shape)
    v = v_cache.flatten(0, 1).index_select(0, slots).view(shape)
    grouped = q.view(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim)
    mask = bucket.mask(q.dtype, sliding_window)  # [S, 1, 1, num_keys]
    out = F.scaled_dot_product_attention(
        grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return out.reshape(num_sequences, num_heads, head_dim)


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, chunk: AttentionChunk, scale: float, sliding_window: int | None
) -> Tensor:
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, tokens, D]
    if num_heads != num_kv_heads:
        k, v = (x.repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (k, v))
    whole = chunk.num_tokens == chunk.num_keys and (
        sliding_window is None or chunk.num_keys <= sliding_window
    )
    mask = None if whole else chunk.mask(q.dtype, q.device, sliding_window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, scale=scale)
    return out.squeeze(0).transpose(0, 1)
