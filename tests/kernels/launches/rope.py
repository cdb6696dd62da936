"""Launches of the rotary embedding: heads of Llama-3.1-8B, and with norms those of Qwen3-8B."""

import itertools

import torch

from weft_kernels.rope import HeadNorms, Rotation, fused

MODULES = (fused,)


def launch(every: bool) -> None:
    """Heads of 128; with `every`, of 64 too, and head norms."""
    _launch(128, has_norms=False)
    if every:
        for head_dim, has_norms in itertools.product((64, 128), (False, True)):
            _launch(head_dim, has_norms=has_norms)


def _launch(head_dim: int, *, has_norms: bool) -> None:
    num_rows, num_heads, num_kv_heads = 8, 32, 8

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    qkv = meta(num_rows, (num_heads + 2 * num_kv_heads) * head_dim)
    rotation = Rotation(meta(num_rows, 1, head_dim), meta(num_rows, 1, head_dim))
    norms = HeadNorms(meta(head_dim), meta(head_dim), 1e-5) if has_norms else None
    cache = meta(64, 16, num_kv_heads, head_dim)
    q = fused.write_rotated(qkv, rotation, norms, cache, cache, meta(num_rows, dtype=torch.int64))
    fused.rotate_queries(qkv, rotation, norms, num_kv_heads)
    d_kv = meta(num_rows, num_kv_heads, head_dim, dtype=torch.float32)
    fused.rotate_backward(qkv, rotation, norms, q, d_kv, d_kv)
