"""Attention over the paged cache: decode rows, prompt chunks, and the backward of a training window."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels.attention import KeyTarget, SavedAttention, attention_backward, paged_attention
from weft_scheduler.plan import Segment, SegmentKind
from weft_server.bench.kernels.case import OpCase, Subject, relative_error
from weft_server.cache.kv import KvCache
from weft_server.engine.batch import build_batch
from weft_server.engine.sequence import Sequence
from weft_server.model.batch import TokenBatch
from weft_server.protocol import SamplingParams

_BLOCK_SIZE = 16


def cases(subject: Subject) -> Iterator[OpCase]:
    """Decode batches of short and long contexts, a whole prompt, a chunk behind a long one; two backwards."""
    long = 2048 if subject.on_gpu else 1024
    yield _paged(subject, "decode", [(length, 1) for length in [128] * subject.num_decode])
    yield _paged(subject, "decode", [(long, 1)] * subject.num_decode)
    yield _paged(
        subject, "decode, mixed lengths", [(64 + 61 * idx % long, 1) for idx in range(subject.num_decode)]
    )
    yield _paged(subject, "prefill", [(512, 512)])
    yield _paged(subject, "prefill chunk", [(long, 128)])
    yield _backward(subject, 512, 512)
    yield _backward(subject, long, 256)


def _paged(subject: Subject, name: str, sequences: list[tuple[int, int]]) -> OpCase:
    """`sequences` are `(keys, rows)`: the rows are the last of the keys."""
    config = subject.model.config
    cache, batch = _layout(subject, sequences)
    num_rows = sum(rows for _, rows in sequences)
    q = subject.randn(num_rows, config.num_heads, config.head_dim)
    scale = config.head_dim**-0.5

    def run() -> Tensor:
        return paged_attention(q, cache.keys[0], cache.values[0], batch.attention, scale=scale)

    keys, values = (_contiguous(tensor, sequences) for tensor in (cache.keys[0], cache.values[0]))

    def defined(dtype: torch.dtype) -> Tensor:
        parts, row = [], 0
        for (num_keys, rows), k, v in zip(sequences, keys, values, strict=True):
            parts.append(
                _attend(q[row : row + rows].to(dtype), k.to(dtype), v.to(dtype), num_keys - rows, scale)
            )
            row += rows
        return torch.cat(parts)

    key_bytes = sum(num_keys for num_keys, _ in sequences) * cache.bytes_per_layer_token
    products = sum(rows * (num_keys - (rows - 1) / 2) for num_keys, rows in sequences)
    shown = sorted({num_keys for num_keys, _ in sequences})
    contexts = str(shown[0]) if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"
    return OpCase(
        op=f"attention {name}",
        shape=f"{len(sequences)} sequences, {num_rows} rows, {contexts} keys",
        num_bytes=key_bytes + 2 * q.nbytes,
        flops=4.0 * config.num_heads * config.head_dim * products,
        run=run,
        error=lambda: relative_error(run(), defined(torch.float32)),
        peers={"torch, contiguous keys, a call for each sequence": lambda: defined(subject.dtype)},
    )


def _backward(subject: Subject, num_keys: int, num_rows: int) -> OpCase:
    """The last `num_rows` of a sequence: output, then gradients of queries and of all keys and values."""
    config = subject.model.config
    cache, batch = _layout(subject, [(num_keys, num_rows)])
    (k,), (v,) = (_contiguous(t, [(num_keys, num_rows)]) for t in (cache.keys[0], cache.values[0]))
    q, d_out = (subject.randn(num_rows, config.num_heads, config.head_dim, scale=s) for s in (1.0, 0.5))
    scale = config.head_dim**-0.5
    target = KeyTarget(torch.zeros(k.shape, device=k.device), torch.zeros(k.shape, device=k.device), 0)

    def run() -> Tensor:
        stats = q.new_empty(q.shape[:2], dtype=torch.float32)
        keys, values, rows = cache.keys[0], cache.values[0], batch.attention
        out = paged_attention(q, keys, values, rows, scale=scale, stats=stats)
        saved = SavedAttention(q, keys, values, rows, scale, None, out, stats)
        return attention_backward(d_out, saved, [target])

    def defined(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k, v)]
        with torch.enable_grad():
            out = _attend(leaves[0], leaves[1], leaves[2], num_keys - num_rows, scale)
        return torch.autograd.grad(out, leaves, d_out.to(dtype))

    def error() -> float:
        target.d_k.zero_()
        target.d_v.zero_()
        gradients = (run(), target.d_k, target.d_v)
        return max(relative_error(a, e) for a, e in zip(gradients, defined(torch.float32), strict=True))

    products = num_rows * (num_keys - (num_rows - 1) / 2)
    return OpCase(
        op="attention backward, forward again included",
        shape=f"{num_rows} rows, {num_keys} keys",
        num_bytes=4 * q.nbytes + 4 * k.nbytes + 4 * target.d_k.nbytes,
        flops=3.5 * 4.0 * config.num_heads * config.head_dim * products,
        run=run,
        error=error,
        peers={"torch autograd": lambda: defined(subject.dtype)},
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, first_row: int, scale: float) -> Tensor:
    """torch's attention of a sequence: q `[n, H, D]` at positions from `first_row`, k, v `[m, Hkv, D]`."""
    queries, keys, values = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
    if len(q) == 1:
        mask, causal = None, False
    elif first_row == 0:
        mask, causal = None, True
    else:
        mask, causal = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(first_row), False
    out = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.squeeze(0).transpose(0, 1)


def _layout(subject: Subject, sequences: list[tuple[int, int]]) -> tuple[KvCache, TokenBatch]:
    """A cache of random keys and values, and the engine's own batch over it, blocks in a shuffled order."""
    config, device = subject.model.config, subject.device
    counts = [-(-num_keys // _BLOCK_SIZE) for num_keys, _ in sequences]
    cache = KvCache(
        num_layers=1,
        num_blocks=sum(counts),
        block_size=_BLOCK_SIZE,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=subject.dtype,
        device=device,
    )
    cache.keys[0].copy_(subject.randn(*cache.keys[0].shape))
    cache.values[0].copy_(subject.randn(*cache.values[0].shape, scale=0.5))
    tables = _tables(sequences)
    segments = [
        Segment(
            sequence_id=str(idx),
            kind=SegmentKind.DECODE if rows == 1 else SegmentKind.PREFILL,
            start=num_keys - rows,
            num_tokens=rows,
            adapter_slot=None,
            block_ids=tables[idx],
        )
        for idx, (num_keys, rows) in enumerate(sequences)
    ]
    known = {
        str(idx): Sequence(str(idx), [0] * num_keys, SamplingParams(max_tokens=1), 0)
        for idx, (num_keys, _) in enumerate(sequences)
    }
    batch = build_batch(
        segments,
        known,
        {},
        block_size=_BLOCK_SIZE,
        device=device,
    )
    return cache, batch.tokens


def _tables(sequences: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    counts = [-(-num_keys // _BLOCK_SIZE) for num_keys, _ in sequences]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).tolist()
    tables, first = [], 0
    for count in counts:
        tables.append(tuple(order[first : first + count]))
        first += count
    return tables


def _contiguous(cached: Tensor, sequences: list[tuple[int, int]]) -> list[Tensor]:
    """Each sequence's keys (or values) `[m, Hkv, D]`, one behind the other."""
    return [
        cached[torch.tensor(table, device=cached.device)].flatten(0, 1)[:num_keys].contiguous()
        for table, (num_keys, _) in zip(_tables(sequences), sequences, strict=True)
    ]
