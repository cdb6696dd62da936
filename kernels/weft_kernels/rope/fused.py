"""Rotary embedding in Triton, for CUDA tensors and, under Triton's interpreter, CPU tensors.

Same functions as `reference.py`, which defines them; arguments are checked by the package's entry points.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from weft_kernels.rope.kernels import rotate_backward_kernel, rotate_kernel
from weft_kernels.rope.rotation import HeadNorms, Rotation

_MAX_HEADS = 8


def write_rotated(
    qkv: Tensor,
    rotation: Rotation,
    norms: HeadNorms | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Rotated queries; keys and values go to the cache."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    return _rotate(qkv, rotation, norms, num_heads, num_kv_heads, (k_cache, v_cache, slot_mapping))


def rotate_queries(qkv: Tensor, rotation: Rotation, norms: HeadNorms | None, num_kv_heads: int) -> Tensor:
    """Rotated queries alone."""
    num_heads = qkv.shape[1] // rotation.cos.shape[-1] - 2 * num_kv_heads
    return _rotate(qkv, rotation, norms, num_heads, num_kv_heads, None)


def rotate_backward(
    qkv: Tensor, rotation: Rotation, norms: HeadNorms | None, d_q: Tensor, d_k: Tensor, d_v: Tensor
) -> Tensor:
    """Cotangent of the fused projection."""
    (num_rows, num_heads, head_dim), num_kv_heads = d_q.shape, d_k.shape[1]
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    heads = _heads_per_program(num_heads, num_kv_heads)
    rotate_backward_kernel[(num_rows, (num_heads + 2 * num_kv_heads) // heads)](
        *(qkv, *rotation, *_norm_arguments(norms, qkv)),
        *(d_q.contiguous(), d_k.contiguous(), d_v.contiguous(), d_qkv, num_heads, num_kv_heads),
        HAS_NORM=norms is not None,
        HEADS=heads,
        HALF=head_dim // 2,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return d_qkv


def _rotate(
    qkv: Tensor,
    rotation: Rotation,
    norms: HeadNorms | None,
    num_heads: int,
    num_kv_heads: int,
    cache: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    num_rows, head_dim = qkv.shape[0], rotation.cos.shape[-1]
    q = torch.empty((num_rows, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    heads = _heads_per_program(num_heads, num_kv_heads)
    num_launched = num_heads if cache is None else num_heads + 2 * num_kv_heads
    rotate_kernel[(num_rows, num_launched // heads)](
        *(qkv, *rotation, *_norm_arguments(norms, qkv), q),
        *((q, q, qkv) if cache is None else cache),
        *(num_heads, num_kv_heads),
        HAS_NORM=norms is not None,
        WRITES=cache is not None,
        HEADS=heads,
        HALF=head_dim // 2,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return q


def _heads_per_program(num_heads: int, num_kv_heads: int) -> int:
    """The largest power of two, up to a limit, that divides both."""
    return math.gcd(num_heads, num_kv_heads, _MAX_HEADS)


def _norm_arguments(norms: HeadNorms | None, absent: Tensor) -> tuple[Tensor, Tensor, float]:
    return (absent, absent, 0.0) if norms is None else (norms.query, norms.key, norms.eps)
