"""Launches of paged attention: the heads of Llama-3.1-8B, and those of the benchmarks' models."""

import itertools

import torch

from weft_kernels.attention import AttentionBatch, DecodeRow, KeyTarget, SavedAttention, fused, make_chunk

MODULES = (fused,)


def launch(every: bool) -> None:
    """Heads of 128, blocks of 16 and long chunks; with `every`, heads of 64, blocks of 32, short chunks."""
    _launch(128, 16, num_tokens=512)
    if every:
        for head_dim, block_size, num_tokens in itertools.product((64, 128), (16, 32), (16, 512)):
            _launch(head_dim, block_size, num_tokens=num_tokens)


def _launch(head_dim: int, block_size: int, *, num_tokens: int) -> None:
    """One decode row and 32 of them (with and without splits) beside a chunk, and a chunk's backward."""
    num_heads, num_kv_heads, num_keys = 32, 8, 2048

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    cache = meta(1024, block_size, num_kv_heads, head_dim)
    table = torch.empty(num_keys // block_size, dtype=torch.int64, device="meta")
    for num_decode in (1, 32):
        rows = [DecodeRow(range(num_keys // block_size), num_keys)] * num_decode
        chunk = make_chunk(num_decode, num_tokens, 0, num_keys, table, block_size)
        q = meta(num_decode + num_tokens, num_heads, head_dim)
        fused.paged_attention(q, cache, cache, AttentionBatch(rows, [chunk]), scale=0.1)
    q = meta(num_tokens, num_heads, head_dim)
    chunks = AttentionBatch((), [make_chunk(0, num_tokens, 0, num_keys, table, block_size)])
    stats = meta(num_tokens, num_heads, dtype=torch.float32)
    out = fused.paged_attention(q, cache, cache, chunks, scale=0.1, stats=stats)
    saved = SavedAttention(q, cache, cache, chunks, 0.1, None, out, stats)
    accumulator = meta(num_keys, num_kv_heads, head_dim, dtype=torch.float32)
    fused.attention_backward(out, saved, [KeyTarget(accumulator, accumulator, 0)])
