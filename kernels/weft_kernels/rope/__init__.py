"""Rotary embedding of queries and keys, with the head norms that some families put before it and the write of
keys and values to the paged cache after it; and the backward of it all.

    out[:half] = x[:half] · cos - x[half:] · sin        out[half:] = x[half:] · cos + x[:half] · sin

with `x` a head of `D = 2 · half` elements, normed first where the family does that (Su et al. 2021; halves
are paired as in Hugging Face checkpoints). Chooses between the Triton kernels (CUDA tensors) and the
reference (everything else; float64 always).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft_kernels.rope import reference
from weft_kernels.rope.reference import apply_rope
from weft_kernels.rope.rotation import HeadNorms, Rotation

__all__ = [
    "HeadNorms",
    "KvSlots",
    "Rotation",
    "apply_rope",
    "rotate_backward",
    "rotate_queries",
    "write_rotated",
]


@dataclass(frozen=True, slots=True)
class KvSlots:
    """Where a batch's keys and values go: one layer's cache `[num_blocks, block_size, Hkv, D]` of each, and
    `slot_mapping` `[T]` int64 (block id · block size + offset; a row whose slot is negative is padding and
    goes nowhere)."""

    keys: Tensor
    values: Tensor
    slot_mapping: Tensor


def write_rotated(qkv: Tensor, rotation: Rotation, norms: HeadNorms | None, slots: KvSlots) -> Tensor:
    """Rotated queries of a fused projection; its rotated keys and its values go to the cache.

    Args:
        qkv: `[T, (H + 2·Hkv)·D]`, contiguous: queries, keys, values.
        rotation: of the rows' positions.
        norms: of query and key heads, before the rotation; None for families without.
        slots: written.

    Returns:
        `[T, H, D]`.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    num_kv_heads, head_dim = slots.keys.shape[2:]
    _check(qkv, rotation, norms, num_kv_heads, head_dim)
    if slots.keys.shape != slots.values.shape or slots.slot_mapping.shape != (qkv.shape[0],):
        raise ValueError(f"{tuple(slots.slot_mapping.shape)} slots do not fit {qkv.shape[0]} rows")
    if slots.keys.dtype != qkv.dtype or slots.values.dtype != qkv.dtype:
        raise ValueError(f"a cache of {slots.keys.dtype} cannot take rows of {qkv.dtype}")
    if _use_kernels(qkv):
        from weft_kernels.rope import fused

        return fused.write_rotated(qkv, rotation, norms, slots.keys, slots.values, slots.slot_mapping)
    return reference.write_rotated(qkv, rotation, norms, slots.keys, slots.values, slots.slot_mapping)


def rotate_queries(qkv: Tensor, rotation: Rotation, norms: HeadNorms | None, num_kv_heads: int) -> Tensor:
    """Rotated queries `[T, H, D]` of a fused projection, as in `write_rotated`, and nothing else.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(qkv, rotation, norms, num_kv_heads, rotation.cos.shape[-1])
    if _use_kernels(qkv):
        from weft_kernels.rope import fused

        return fused.rotate_queries(qkv, rotation, norms, num_kv_heads)
    return reference.rotate_queries(qkv, rotation, norms, num_kv_heads)


def rotate_backward(
    qkv: Tensor, rotation: Rotation, norms: HeadNorms | None, d_q: Tensor, d_k: Tensor, d_v: Tensor
) -> Tensor:
    """Cotangent of a fused projection.

    Args:
        qkv, rotation, norms: as in `write_rotated`.
        d_q: cotangent of the rotated queries `[T, H, D]`.
        d_k: of the rotated keys, `[T, Hkv, D]`, in any float dtype; `d_v` of the values alike.

    Returns:
        `[T, (H + 2·Hkv)·D]` in the dtype of `qkv`.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(qkv, rotation, norms, d_k.shape[1], d_k.shape[2])
    num_heads = qkv.shape[1] // d_k.shape[2] - 2 * d_k.shape[1]
    if d_k.shape != d_v.shape or d_q.shape != (qkv.shape[0], num_heads, d_k.shape[2]):
        shapes = tuple(d_q.shape), tuple(d_k.shape), tuple(d_v.shape)
        raise ValueError(f"cotangents {shapes} do not fit {tuple(qkv.shape)}")
    if _use_kernels(qkv):
        from weft_kernels.rope import fused

        return fused.rotate_backward(qkv, rotation, norms, d_q, d_k, d_v)
    return reference.rotate_backward(qkv, rotation, norms, d_q, d_k, d_v)


def _use_kernels(qkv: Tensor) -> bool:
    return qkv.is_cuda and qkv.dtype != torch.float64


def _check(
    qkv: Tensor, rotation: Rotation, norms: HeadNorms | None, num_kv_heads: int, head_dim: int
) -> None:
    if qkv.dim() != 2 or not qkv.is_contiguous() or head_dim % 2 or qkv.shape[1] % head_dim:
        raise ValueError(f"{tuple(qkv.shape)} is no contiguous row of heads of {head_dim} per token")
    if qkv.shape[1] // head_dim <= 2 * num_kv_heads:
        raise ValueError(f"{tuple(qkv.shape)} leaves no query heads beside {num_kv_heads} key/value heads")
    if rotation.cos.shape != (qkv.shape[0], 1, head_dim) or rotation.sin.shape != rotation.cos.shape:
        raise ValueError(f"rotation {tuple(rotation.cos.shape)} is not of {qkv.shape[0]} rows of {head_dim}")
    if norms is not None and not norms.query.shape == norms.key.shape == (head_dim,):
        raise ValueError(f"head norms {tuple(norms.query.shape)} do not fit heads of {head_dim}")
