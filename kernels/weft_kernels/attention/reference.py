"""Paged attention in plain PyTorch: what the kernels must equal, and the CPU path.

Works on the groups of `tiles.py`, whose keys are gathered. A group of decode rows is one call of the
library's attention. In a group of chunks' tiles, scores, softmax and output are one batched operation each,
over all its sequences and heads; the rows that share a key head are rows of one matrix product, so keys are
never repeated. Scores exist for one group at a time, in the processor's cache.

The library's own CPU attention computes bf16 at the speed of fp32; its bf16 matrix products are four times
as fast, but round scores to eight bits. A softmax does not change when a row's scores are shifted, and bf16
is fine near zero: so the scores of bf16 inputs are computed twice, and the second time the row's maximum is
subtracted inside the product, before rounding. What is rounded then is small where the weight is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels.attention.batch import AttentionBatch
from weft_kernels.attention.tiles import TileGroup, tile_groups
from weft_kernels.attention.training import KeyTarget, SavedAttention

_GATHERED_BYTES = 4 << 20
"""Keys and values that one call over decode rows gathers: about what a processor's caches hold."""


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
    """Attention of a flat batch over cached keys and values; see `weft_kernels.attention.paged_attention`.
    Differentiable by autograd for fp32 and fp64. `stats` are the shifts of the rows of chunks, where scores
    are shifted."""
    groups = _groups(q, k_cache, batch, sliding_window)
    if len(groups) == 1 and groups[0].is_decode:
        return _decode(groups[0], q, k_cache, v_cache, scale)
    out, dtype = torch.empty_like(q), _inner_dtype(q.dtype)
    for group in groups:
        if group.is_decode:
            out[group.rows] = _decode(group, q, k_cache, v_cache, scale)
            continue
        grouped = _Grouped(group, k_cache.shape[2])
        q_rows, k = grouped.rows(q, dtype), grouped.keys(k_cache, dtype)
        shift = _shift(grouped, q_rows, k, scale) if _shifts_scores(dtype) else None
        if stats is not None and shift is not None:
            grouped.put_rows(stats.unsqueeze(2), shift)
        weights = _weights(grouped, q_rows, k, scale, shift)
        grouped.put_rows(out, torch.bmm(weights, grouped.keys(v_cache, dtype)))
    return out


def attention_backward(d_out: Tensor, saved: SavedAttention, targets: Sequence[KeyTarget]) -> Tensor:
    """Cotangent of the queries; adds those of keys and values to their accumulators. See
    `weft_kernels.attention.attention_backward`."""
    q, k_cache, v_cache, scale = saved.q, saved.k_cache, saved.v_cache, saved.scale
    groups = _groups(q, k_cache, saved.batch, saved.sliding_window)
    num_kv_heads, head_dim = k_cache.shape[2:]
    dtype = _inner_dtype(q.dtype)
    d_q = torch.empty_like(q)
    for group in groups:
        grouped = _Grouped(group, num_kv_heads)
        q_rows, out_rows = grouped.rows(q, dtype), grouped.rows(saved.out, dtype)
        d_out_rows = grouped.real_rows(d_out, dtype)
        k, v = grouped.keys(k_cache, dtype), grouped.keys(v_cache, dtype)
        shift = grouped.rows(saved.stats.unsqueeze(2), dtype) if _shifts_scores(dtype) else None
        weights = _weights(grouped, q_rows, k, scale, shift)
        # The backward of a softmax ignores shifts of a row too: near zero, less is lost by rounding.
        delta = (d_out_rows * out_rows).sum(-1, keepdim=True)
        d_weights = torch.baddbmm(delta, d_out_rows, v.transpose(1, 2), beta=-1)
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, dtype)
        grouped.put_rows(d_q, _product(d_scores, k, scale))
        d_k = _product(d_scores.transpose(1, 2), q_rows, scale)
        d_v = torch.bmm(weights.transpose(1, 2), d_out_rows)
        shape = (group.num_tiles, num_kv_heads, group.num_keys, head_dim)
        _add_to_targets(group, d_k.view(shape), d_v.view(shape), targets)
    return d_q


def _groups(
    q: Tensor, k_cache: Tensor, batch: AttentionBatch, sliding_window: int | None
) -> tuple[TileGroup, ...]:
    block_size, num_heads = k_cache.shape[1], q.shape[1]
    max_decode_keys = _GATHERED_BYTES // (2 * k_cache[0, 0].nbytes)
    return batch.once(
        ("tiles", block_size, num_heads, sliding_window, max_decode_keys),
        lambda: tile_groups(
            batch,
            block_size,
            sliding_window,
            q.device,
            num_heads=num_heads,
            max_decode_keys=max_decode_keys,
        ),
    )


def _decode(group: TileGroup, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> Tensor:
    """Output of a group of decode rows, `[num_tiles, H, D]`."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    slots = group.slots.view(-1)
    shape = (group.num_tiles, group.num_keys, num_kv_heads, head_dim)
    k = k_cache.flatten(0, 1).index_select(0, slots).view(shape).transpose(1, 2)
    v = v_cache.flatten(0, 1).index_select(0, slots).view(shape).transpose(1, 2)
    rows = q[group.rows] if isinstance(group.rows, slice) else q.index_select(0, group.rows)
    mask = group.mask(q.dtype)
    out = F.scaled_dot_product_attention(
        rows.reshape(group.num_tiles, num_kv_heads, -1, head_dim),  # heads of a group as queries
        k,
        v,
        attn_mask=None if mask is None else mask[:, :, :, 0],
        scale=scale,
    )
    return out.reshape(group.num_tiles, -1, head_dim)


@dataclass(frozen=True, slots=True)
class _Grouped:
    """Between flat rows `[T, H, D]` and a group's matrices `[num_tiles · Hkv, num_rows · G, D]`, with G query
    heads to a key head."""

    group: TileGroup
    num_kv_heads: int

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        group, rows = self.group, self.group.rows
        tiles = x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
        head_dim = x.shape[2]
        tiles = tiles.reshape(group.num_tiles, group.num_rows, self.num_kv_heads, -1, head_dim)
        return tiles.transpose(1, 2).reshape(group.num_tiles * self.num_kv_heads, -1, head_dim).to(dtype)

    def real_rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The same with zeros for padding."""
        group, rows = self.group, self.group.rows
        if group.real is None or isinstance(rows, slice):
            return self.rows(x, dtype)
        padded = x.new_zeros((len(rows), *x.shape[1:]))
        padded.index_copy_(0, group.real, x.index_select(0, rows.index_select(0, group.real)))
        shape = (group.num_tiles, group.num_rows, self.num_kv_heads, -1, x.shape[2])
        tiles = padded.view(shape).transpose(1, 2)
        return tiles.reshape(group.num_tiles * self.num_kv_heads, -1, x.shape[2]).to(dtype)

    def put_rows(self, out: Tensor, x: Tensor) -> None:
        """Write matrices to their rows of `out` `[T, H, D]`."""
        group, rows = self.group, self.group.rows
        shape = (group.num_tiles, self.num_kv_heads, group.num_rows, -1, out.shape[2])
        tiles = x.view(shape).transpose(1, 2).reshape(-1, *out.shape[1:]).to(out.dtype)
        if isinstance(rows, slice):
            out[rows] = tiles
        elif group.real is None:
            out.index_copy_(0, rows, tiles)
        else:
            out.index_copy_(0, rows.index_select(0, group.real), tiles.index_select(0, group.real))

    def keys(self, cache: Tensor, dtype: torch.dtype) -> Tensor:
        """A group's keys or values, gathered: `[num_tiles · Hkv, num_keys, D]`."""
        rows = cache.view(-1, cache.shape[3]).index_select(0, self.group.key_rows(self.num_kv_heads))
        return rows.view(-1, self.group.num_keys, cache.shape[3]).to(dtype)

    def scores(self, q: Tensor, keys: Tensor, scale: float, shift: Tensor | None = None) -> Tensor:
        """`scale · q keys - shift`, minus infinity where a row does not see a key: all inside the product,
        before rounding. `keys` is `[num_tiles · Hkv, D, num_keys]`, `shift`
        `[num_tiles · Hkv, num_rows · G, 1]`."""
        group, mask = self.group, self.group.mask(q.dtype)
        if mask is None:
            if shift is None:
                return _product(q, keys, scale)
            return torch.baddbmm(shift, q, keys, beta=-1, alpha=scale)
        shape = (group.num_tiles, self.num_kv_heads, group.num_rows, q.shape[1] // group.num_rows)
        if shift is None:
            start = mask.expand(*shape, -1).clone(memory_format=torch.contiguous_format)
        else:
            start = mask - shift.view(*shape, 1)
        return start.view(len(q), q.shape[1], -1).baddbmm_(q, keys, alpha=scale)


def _shifts_scores(dtype: torch.dtype) -> bool:
    """Whether products in this dtype round scores so much that they are shifted before."""
    return dtype not in (torch.float32, torch.float64)


def _shift(grouped: _Grouped, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Largest score of every row."""
    return grouped.scores(q, k.transpose(1, 2), scale).amax(-1, keepdim=True)


def _weights(grouped: _Grouped, q: Tensor, k: Tensor, scale: float, shift: Tensor | None) -> Tensor:
    """Softmax of a group's scores less `shift`."""
    scores = grouped.scores(q, k.transpose(1, 2), scale, shift)
    return scores.softmax(-1) if scores.requires_grad else torch.softmax(scores, -1, out=scores)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale · a b`, the factor applied before rounding."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _add_to_targets(group: TileGroup, d_k: Tensor, d_v: Tensor, targets: Sequence[KeyTarget]) -> None:
    for tile, span in enumerate(group.spans):
        target = targets[span.chunk_idx]
        first = target.first_key + span.first_key
        target.d_k[first : first + span.num_keys] += d_k[tile, :, : span.num_keys].transpose(0, 1)
        target.d_v[first : first + span.num_keys] += d_v[tile, :, : span.num_keys].transpose(0, 1)


def _inner_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products are computed in: fp32 where the library has no fast ones for a narrower type."""
    if dtype in (torch.float32, torch.float64):
        return dtype
    return dtype if dtype == torch.bfloat16 and has_bf16_products() else torch.float32


def has_bf16_products() -> bool:
    """Whether the library multiplies bf16 matrices by the processor's instructions (a private name: where it
    is gone, the answer is no)."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and torch.backends.mkldnn.is_available() and bool(supported())  # type: ignore[no-untyped-call]
