"""Paged attention in Triton: one launch (two where keys are split) for all decode rows, one for all chunks.

Host side of the kernels in `kernels.py`: scratch, tile sizes, splits and grids. Same functions as
`reference.py`, which defines them; arguments are checked by the package's entry points. Runs on CUDA tensors,
and on CPU tensors under Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft_kernels.attention.batch import AttentionBatch
from weft_kernels.attention.kernels import (
    chunk_kernel,
    combine_kernel,
    decode_kernel,
    key_grad_kernel,
    query_grad_kernel,
)
from weft_kernels.attention.tables import (
    MAX_PARTS,
    SMALL_TILE,
    AttentionTables,
    ChunkTables,
    DecodeTables,
    TableShape,
)
from weft_kernels.attention.training import KeyTarget, SavedAttention
from weft_kernels.transfer import upload_indices

_NO_WINDOW = 1 << 30
_PROGRAMS_PER_SM = 2
_DEFAULT_SMS = 132


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
    """Attention of a flat batch over cached keys and values; `stats` are the log-sum-exps of the rows of
    chunks. See `weft_kernels.attention.paged_attention`."""
    call = _Call.of(q, k_cache, v_cache, batch, scale, sliding_window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if call.tables.decode is not None:
        call.decode(call.tables.decode, out)
    if call.tables.chunks is not None:
        call.chunks(call.tables.chunks, out, stats)
    return out


def attention_backward(d_out: Tensor, saved: SavedAttention, targets: Sequence[KeyTarget]) -> Tensor:
    """Cotangent of the queries; adds those of keys and values: `weft_kernels.attention.attention_backward`.

    Raises:
        ValueError: an accumulator that is not float32 or not aligned (the kernels accumulate in float32).
    """
    call = _Call.of(saved.q, saved.k_cache, saved.v_cache, saved.batch, saved.scale, saved.sliding_window)
    d_q = torch.empty(d_out.shape, dtype=d_out.dtype, device=d_out.device)
    if call.tables.chunks is not None:
        addresses = _addresses(saved.batch, targets, d_out.device)
        call.chunks_backward(call.tables.chunks, saved.out, d_out.contiguous(), saved.stats, d_q, addresses)
    return d_q


def table_shape(q: Tensor, k_cache: Tensor) -> TableShape:
    """What the tables of any batch of queries `[T, H, D]` over this cache depend on."""
    num_kv_heads = k_cache.shape[2]
    num_programs = max(1, _PROGRAMS_PER_SM * _num_sms(q.device) // num_kv_heads)
    return TableShape(q.shape[1] // num_kv_heads, _block_n(q), num_programs)


@dataclass(frozen=True, slots=True)
class _Call:
    """One batch over one layer's cache."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    tables: AttentionTables
    scale: float
    window: int

    @staticmethod
    def of(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        sliding_window: int | None,
    ) -> _Call:
        if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
            q = q.contiguous()
        shape = table_shape(q, k_cache)
        tables = batch.once(shape, lambda: AttentionTables.build(batch, q.device, shape))
        return _Call(q, k_cache, v_cache, tables, scale, sliding_window or _NO_WINDOW)

    @property
    def num_kv_heads(self) -> int:
        return self.k_cache.shape[2]

    def decode(self, tables: DecodeTables, out: Tensor) -> None:
        num_heads, head_dim = self.q.shape[1:]
        size = tables.parts.shape[0] * num_heads if tables.is_split else 0
        partial = torch.empty((size, head_dim), dtype=torch.float32, device=self.q.device)
        partial_lse = torch.empty(size, dtype=torch.float32, device=self.q.device)
        decode_kernel[(tables.parts.shape[0], self.num_kv_heads)](
            *(self.q, self.q.stride(0), self.k_cache, self.v_cache, out, partial, partial_lse),
            *(tables.rows, tables.parts, tables.block_ids),
            *(self.num_kv_heads, self.scale * math.log2(math.e), self.window),
            SPLIT=tables.is_split,
            **self._sizes(),
            BLOCK_G=_padded(num_heads // self.num_kv_heads),
            BLOCK_N=_block_n(self.q),
            num_warps=4,
            num_stages=3,
        )
        if tables.is_split:
            combine_kernel[(tables.rows.shape[0], num_heads)](
                *(partial, partial_lse, out, tables.rows, num_heads, self.window),
                HEAD_DIM=head_dim,
                BLOCK_S=MAX_PARTS,
                BLOCK_D=_padded(head_dim),
                num_warps=4,
            )

    def chunks(self, tables: ChunkTables, out: Tensor, lse: Tensor | None) -> None:
        chunk_kernel[(tables.query_tiles.shape[0], self.num_kv_heads)](
            *(self.q, self.q.stride(0), self.k_cache, self.v_cache, out, lse),
            *(tables.chunks, tables.query_tiles, tables.block_ids),
            *(self.num_kv_heads, self.scale * math.log2(math.e), self.window),
            SAVED=lse is not None,
            **self._sizes(),
            BLOCK_M=tables.tile_rows,
            BLOCK_N=_block_n(self.q),
            num_warps=_num_warps(tables.tile_rows, self.q.shape[2]),
            num_stages=2,
        )

    def chunks_backward(
        self, tables: ChunkTables, out: Tensor, d_out: Tensor, lse: Tensor, d_q: Tensor, addresses: Tensor
    ) -> None:
        delta = torch.empty_like(lse)
        block_n = _block_n(self.q)
        common = (tables.block_ids, self.num_kv_heads, self.scale, self.window)
        query_grad_kernel[(tables.query_tiles.shape[0], self.num_kv_heads)](
            *(self.q, self.q.stride(0), self.k_cache, self.v_cache, out, d_out, lse, delta, d_q),
            *(tables.chunks, tables.query_tiles, *common),
            **self._sizes(),
            BLOCK_M=tables.tile_rows,
            BLOCK_N=block_n // 2,
            num_warps=_num_warps(tables.tile_rows, self.q.shape[2]),
            num_stages=2,
        )
        key_grad_kernel[(tables.key_tiles.shape[0], self.num_kv_heads)](
            *(self.q, self.q.stride(0), self.k_cache, self.v_cache, d_out, lse, delta, addresses),
            *(tables.chunks, tables.key_tiles, *common),
            **self._sizes(),
            BLOCK_M=SMALL_TILE,
            BLOCK_N=block_n,
            num_warps=8,
            num_stages=2,
        )

    def _sizes(self) -> dict[str, int]:
        num_heads, head_dim = self.q.shape[1:]
        return {
            "GROUP": num_heads // self.num_kv_heads,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": self.k_cache.shape[1],
            "BLOCK_D": _padded(head_dim),
        }


def _addresses(batch: AttentionBatch, targets: Sequence[KeyTarget], device: torch.device) -> Tensor:
    """Where each chunk's first key adds, `[C, 2]` int64; uploaded when it differs from the last layer's."""
    values: list[int] = []
    for target in targets:
        for accumulator in (target.d_k, target.d_v):
            first = accumulator[target.first_key :]
            if first.dtype != torch.float32 or first.data_ptr() % 16:
                raise ValueError(f"accumulators must be float32 and 16-byte aligned, got {first.dtype}")
            values.append(first.data_ptr())
    return batch.once(("addresses", tuple(values)), lambda: upload_indices(values, device))


def _block_n(q: Tensor) -> int:
    return 64 if q.dtype.itemsize <= 2 else 32


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _num_warps(tile_rows: int, head_dim: int) -> int:
    return 4 if tile_rows == SMALL_TILE and head_dim <= 64 else 8


def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return _DEFAULT_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
