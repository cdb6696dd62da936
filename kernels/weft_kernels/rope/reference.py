"""Rotary embedding in plain PyTorch: the definition of the op, and the CPU path.

Arguments are checked by the package's entry points; see there for shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft_kernels.norm import reference as norm
from weft_kernels.rope.rotation import HeadNorms, Rotation


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[T, heads, D]` by `(cos, sin)` `[T, 1, D]`.

    A rotation is orthogonal up to the scaling's attention factor, so its backward is the same function with
    the sine negated.
    """
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + rotated * sin


def write_rotated(
    qkv: Tensor,
    rotation: Rotation,
    norms: HeadNorms | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Rotated queries; keys and values go to the cache."""
    num_kv_heads = k_cache.shape[2]
    heads = qkv.view(len(qkv), -1, k_cache.shape[3])
    num_heads = heads.shape[1] - 2 * num_kv_heads
    qk = apply_rope(_normed(heads[:, : num_heads + num_kv_heads], norms, num_heads), *rotation)
    k, v = qk[:, num_heads:], heads[:, num_heads + num_kv_heads :]
    if len(qkv) and slot_mapping.min() < 0:
        written = slot_mapping >= 0
        k, v, slot_mapping = k[written], v[written], slot_mapping[written]
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, k)
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v)
    return qk[:, :num_heads]


def rotate_queries(qkv: Tensor, rotation: Rotation, norms: HeadNorms | None, num_kv_heads: int) -> Tensor:
    """Rotated queries alone."""
    heads = qkv.view(len(qkv), -1, rotation.cos.shape[-1])
    q = heads[:, : heads.shape[1] - 2 * num_kv_heads]
    if norms is not None:
        q = norm.rms_norm(q, norms.query, norms.eps)
    return apply_rope(q, *rotation)


def rotate_backward(
    qkv: Tensor, rotation: Rotation, norms: HeadNorms | None, d_q: Tensor, d_k: Tensor, d_v: Tensor
) -> Tensor:
    """Cotangent of the fused projection."""
    num_heads, dtype = d_q.shape[1], qkv.dtype
    d_qk = apply_rope(torch.cat((d_q, d_k.to(dtype)), dim=1), rotation.cos, -rotation.sin)
    if norms is not None:
        heads = qkv.view(len(qkv), -1, d_q.shape[2])[:, : d_qk.shape[1]]
        q_grad = norm.rms_norm_backward(heads[:, :num_heads], norms.query, d_qk[:, :num_heads], norms.eps)
        k_grad = norm.rms_norm_backward(heads[:, num_heads:], norms.key, d_qk[:, num_heads:], norms.eps)
        return torch.cat((q_grad, k_grad, d_v.to(dtype)), dim=1).flatten(1)
    return torch.cat((d_qk, d_v.to(dtype)), dim=1).flatten(1)


def _normed(qk: Tensor, norms: HeadNorms | None, num_heads: int) -> Tensor:
    if norms is None:
        return qk
    q = norm.rms_norm(qk[:, :num_heads], norms.query, norms.eps)
    return torch.cat((q, norm.rms_norm(qk[:, num_heads:], norms.key, norms.eps)), dim=1)
