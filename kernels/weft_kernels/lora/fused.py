"""Batched LoRA in Triton: one launch per product for any number of adapters and all modules of a fused group.

Host side of the kernels in `kernels.py`: scratch, tile sizes and grids. Same functions as `reference.py`,
which defines them; arguments are checked by the package's entry points. Runs on CUDA tensors, and on CPU
tensors under Triton's interpreter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from weft_kernels.lora.batch import LoraBatch
from weft_kernels.lora.dropout import LoraDropout
from weft_kernels.lora.kernels import MAX_GROUP, expand_kernel, shrink_kernel, weight_grad_kernel
from weft_kernels.lora.table import LoraTable


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Compile-time tile sizes: rows of one adapter, ranks, and the wide axis (K or N); warps per program."""

    rows: int
    ranks: int
    columns: int
    num_warps: int


def tile_config(rows: int, max_rank: int, itemsize: int) -> TileConfig:
    """Tile sizes whose operands, double-buffered, stay below 96 KiB of shared memory."""
    ranks = 16 if max_rank <= 16 else 32 if max_rank <= 32 else 64
    columns = 128 if itemsize <= 2 else 64
    return TileConfig(rows, ranks, columns, num_warps=8 if rows >= 64 else 4)


def lora_forward(
    x: Tensor,
    y: Tensor,
    table: LoraTable,
    layer: int,
    modules: tuple[int, ...],
    widths: Sequence[int],
    batch: LoraBatch,
    dropout: LoraDropout | None = None,
) -> None:
    """`y[:, columns of m] += s_m (drop_m(x) A_mᵀ) B_m`; see `weft_kernels.lora.lora_forward`."""
    _check_rows(x, y)
    dropout = _active(dropout)
    for call in _calls(x, table, layer, modules, widths, batch, dropout):
        v = call.scratch()
        call.shrink(x, v, table.a_offsets, in_widths=(x.shape[1],) * call.size, shared=True, dropped=True)
        call.expand(v, y, table.b_offsets, out_widths=call.widths, shared=False)


def lora_backward(
    x: Tensor,
    dy: Tensor,
    dx: Tensor,
    grads: Mapping[int, Tensor],
    table: LoraTable,
    layer: int,
    modules: tuple[int, ...],
    widths: Sequence[int],
    batch: LoraBatch,
    dropout: LoraDropout | None = None,
) -> None:
    """Adds to `dx` and to the flat gradients; see `weft_kernels.lora.lora_backward`.

    Raises:
        ValueError: a gradient that is not float32 (the kernels accumulate in float32).
    """
    _check_rows(x, dy, dx)
    dropout = _active(dropout)
    in_width = x.shape[1]
    for call in _calls(x, table, layer, modules, widths, batch, dropout):
        shared_widths = (in_width,) * call.size
        u = call.scratch()
        call.shrink(dy, u, table.b_offsets, in_widths=call.widths, shared=False, dropped=False)
        call.expand(u, dx, table.a_offsets, out_widths=shared_widths, shared=True)
        if not any(slot in grads for slot, _, _ in batch.segments):
            continue
        v = call.scratch()
        call.shrink(x, v, table.a_offsets, in_widths=shared_widths, shared=True, dropped=True)
        pointers = _grad_pointers(grads, batch)
        call.weight_grad(u, x, pointers, table.a_offsets, widths=shared_widths, shared=True)
        call.weight_grad(v, dy, pointers, table.b_offsets, widths=call.widths, shared=False)


@dataclass(frozen=True, slots=True)
class _Call:
    """Up to `MAX_GROUP` modules of one group on one batch; `first_column` is where their columns begin."""

    table: LoraTable
    batch: LoraBatch
    dropout: LoraDropout | None
    layer: int
    modules: tuple[int, ...]
    widths: tuple[int, ...]
    first_column: int
    max_rank: int
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        return len(self.modules)

    @property
    def rank_stride(self) -> int:
        return -(-self.max_rank // 16) * 16

    @property
    def config(self) -> TileConfig:
        return tile_config(self.batch.tile_rows, self.max_rank, self.dtype.itemsize)

    def scratch(self) -> Tensor:
        """Uninitialised [P, modules × rank_stride]; columns past a module's true rank are never read."""
        size = (self.batch.num_rows, self.size * self.rank_stride)
        return torch.empty(size, dtype=self.dtype, device=self.device)

    def shrink(
        self, x: Tensor, out: Tensor, offsets: Tensor, in_widths: tuple[int, ...], shared: bool, dropped: bool
    ) -> None:
        table, (tiles, _) = self.table, self.batch.tables
        config = self.config
        dropout = self.dropout if dropped else None
        shrink_kernel[(tiles.shape[0], self.size, triton.cdiv(self.max_rank, config.ranks))](
            *(x, x.stride(0), 0 if shared else self.first_column, out, out.stride(0), self.rank_stride),
            *(table.weights, offsets, table.ranks, table.scales),
            *self._site_arguments(dropout),
            *(tiles, self.batch.token_idx),
            *self._module_arguments(in_widths),
            SHARED=shared,
            DROPOUT=dropout is not None,
            BLOCK_M=config.rows,
            BLOCK_R=config.ranks,
            BLOCK_C=config.columns,
            num_warps=config.num_warps,
            num_stages=2,
            enable_fp_fusion=True,
        )

    def expand(
        self, v: Tensor, out: Tensor, offsets: Tensor, out_widths: tuple[int, ...], shared: bool
    ) -> None:
        table, (tiles, _) = self.table, self.batch.tables
        config = self.config
        dropout = self.dropout if shared else None
        grid = (tiles.shape[0], triton.cdiv(max(out_widths), config.columns), 1 if shared else self.size)
        expand_kernel[grid](
            *(v, v.stride(0), self.rank_stride, out, out.stride(0), 0 if shared else self.first_column),
            *(table.weights, offsets, table.ranks),
            *self._site_arguments(dropout),
            *(tiles, self.batch.token_idx),
            *self._module_arguments(out_widths),
            self.size,
            SHARED=shared,
            DROPOUT=dropout is not None,
            BLOCK_M=config.rows,
            BLOCK_R=config.ranks,
            BLOCK_C=config.columns,
            num_warps=config.num_warps,
            num_stages=2,
            enable_fp_fusion=True,
        )

    def weight_grad(
        self,
        left: Tensor,
        right: Tensor,
        grad_pointers: Tensor,
        offsets: Tensor,
        widths: tuple[int, ...],
        shared: bool,
    ) -> None:
        table, (_, segments) = self.table, self.batch.tables
        config = self.config
        dropout = self.dropout if shared else None
        num_rank_blocks = triton.cdiv(self.max_rank, config.ranks)
        grid = (segments.shape[0], triton.cdiv(max(widths), config.columns), self.size * num_rank_blocks)
        weight_grad_kernel[grid](
            *(left, left.stride(0), self.rank_stride, right, right.stride(0)),
            *(0 if shared else self.first_column, grad_pointers, table.base),
            *(offsets, table.ranks),
            *self._site_arguments(dropout),
            *(segments, self.batch.token_idx),
            *self._module_arguments(widths),
            num_rank_blocks,
            SHARED=shared,
            DROPOUT=dropout is not None,
            BLOCK_M=max(32, config.rows),
            BLOCK_R=config.ranks,
            BLOCK_C=config.columns,
            num_warps=8 if config.ranks >= 32 else 4,
            num_stages=2,
            enable_fp_fusion=True,
        )

    def _site_arguments(self, dropout: LoraDropout | None) -> tuple[Tensor | int, ...]:
        table = self.table
        # Without dropout the kernel is compiled without these loads; any tensor stands in.
        p, keys = (table.scales, table.base) if dropout is None else (dropout.p, dropout.keys)
        return (p, keys, self.layer, table.num_layers, table.num_modules)

    def _module_arguments(self, widths: tuple[int, ...]) -> tuple[int, ...]:
        padding = (0,) * (MAX_GROUP - self.size)
        return (*self.modules, *padding, *widths, *padding)


def _calls(
    x: Tensor,
    table: LoraTable,
    layer: int,
    modules: tuple[int, ...],
    widths: Sequence[int],
    batch: LoraBatch,
    dropout: LoraDropout | None,
) -> list[_Call]:
    """The launches that a group needs: one per `MAX_GROUP` modules, none where no slot has any rank."""
    max_rank = max(table.max_rank(slot) for slot, _, _ in batch.segments)
    if max_rank == 0:
        return []
    calls, column = [], 0
    for start in range(0, len(modules), MAX_GROUP):
        part = tuple(widths[start : start + MAX_GROUP])
        members = modules[start : start + MAX_GROUP]
        calls.append(_Call(table, batch, dropout, layer, members, part, column, max_rank, x.dtype, x.device))
        column += sum(part)
    return calls


def _active(dropout: LoraDropout | None) -> LoraDropout | None:
    return dropout if dropout is not None and dropout.active else None


def _check_rows(*matrices: Tensor) -> None:
    for matrix in matrices:
        if matrix.stride(1) != 1:
            raise ValueError(f"rows must be contiguous, got strides {matrix.stride()}")


def _grad_pointers(grads: Mapping[int, Tensor], batch: LoraBatch) -> Tensor:
    for slot, grad in grads.items():
        if grad.dtype != torch.float32 or grad.data_ptr() % (4 * 4):
            raise ValueError(f"gradient of slot {slot} must be float32 and 16-byte aligned, got {grad.dtype}")
    return batch.grad_pointers(grads)
