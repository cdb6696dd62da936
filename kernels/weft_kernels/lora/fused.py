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

_SPLITS = {16: 8, 32: 4, 64: 2}
"""Into how many parts shrink splits its sum over the wide axis, by rows of a tile. Batches of small tiles are
small, and would leave most of the device idle; scratch grows with the parts, and every reader adds them up
again, which is dear where a tile has many rows. The number depends on nothing else, so that neither does
rounding, and so that few variants of a kernel exist."""


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Compile-time tile sizes: rows of one adapter; ranks and columns (of K or N) of a tile in shrink, expand
    and weight gradient; parts of a split sum; warps per program, and tiles in flight."""

    rows: int
    shrink: tuple[int, int]
    expand: tuple[int, int]
    grad: tuple[int, int]
    splits: int
    num_warps: int
    num_stages: int


def tile_config(rows: int, max_rank: int, itemsize: int, *, dropped: bool) -> TileConfig:
    """Tile sizes whose operands in flight stay below 96 KiB of shared memory, and sums in registers.

    Tiles of few rows belong to decoding, which is as fast as weights arrive: more of them in flight.
    """
    ranks = 16 if max_rank <= 16 else 32 if max_rank <= 32 else 64
    columns = 128 if itemsize <= 2 else 64
    is_decode = rows == 16 and ranks == 16
    narrow = columns // 2 if dropped and ranks > 16 else columns
    return TileConfig(
        rows,
        shrink=(ranks, narrow),
        expand=(ranks if rows == 16 else min(ranks, 32), 2 * columns if is_decode else narrow),
        grad=(min(ranks, 32), narrow),
        splits=_SPLITS[rows],
        num_warps=8 if rows >= 64 or (rows >= 32 and dropped) else 4,
        num_stages=4 if is_decode else 2,
    )


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
        widths_in = (x.shape[1],) * call.size
        v = call.shrink(x, table.a_offsets, in_widths=widths_in, shared=True, dropped=True)
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
        u = call.shrink(dy, table.b_offsets, in_widths=call.widths, shared=False, dropped=False)
        call.expand(u, dx, table.a_offsets, out_widths=shared_widths, shared=True)
        if not any(slot in grads for slot, _, _ in batch.segments):
            continue
        v = call.shrink(x, table.a_offsets, in_widths=shared_widths, shared=True, dropped=True)
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
        return int(triton.next_power_of_2(max(16, self.max_rank)))

    def config(self, *, dropped: bool) -> TileConfig:
        return tile_config(self.batch.tile_rows, self.max_rank, self.dtype.itemsize, dropped=dropped)

    def shrink(
        self, x: Tensor, offsets: Tensor, in_widths: tuple[int, ...], shared: bool, dropped: bool
    ) -> Tensor:
        """Scratch [splits, P, modules × rank_stride]; columns past a module's true rank are undefined."""
        table, (tiles, _) = self.table, self.batch.tables
        dropout = self.dropout if dropped else None
        config = self.config(dropped=dropout is not None)
        block_r, block_c = config.shrink
        num_rank_blocks = triton.cdiv(self.max_rank, block_r)
        split_columns = triton.cdiv(max(in_widths), config.splits * block_c) * block_c
        size = (config.splits, self.batch.token_idx.shape[0], self.size * self.rank_stride)
        out = torch.empty(size, dtype=torch.float32, device=self.device)
        shrink_kernel[(tiles.shape[0], self.size * num_rank_blocks, config.splits)](
            *(x, x.stride(0), 0 if shared else self.first_column),
            *(out, out.stride(1), out.stride(0), self.rank_stride),
            *(table.weights, offsets, table.ranks, table.scales),
            *self._site_arguments(dropout),
            *(tiles, self.batch.token_idx),
            *self._module_arguments(in_widths),
            *(num_rank_blocks, split_columns),
            SHARED=shared,
            DROPOUT=dropout is not None,
            BLOCK_M=config.rows,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
        return out

    def expand(
        self, v: Tensor, out: Tensor, offsets: Tensor, out_widths: tuple[int, ...], shared: bool
    ) -> None:
        """Adds `v W` to `out`; `v` is scratch of `shrink`."""
        table, (tiles, _) = self.table, self.batch.tables
        dropout = self.dropout if shared else None
        config = self.config(dropped=dropout is not None)
        block_r, block_c = config.expand
        num_blocks = _num_blocks(out_widths, block_c, shared)
        expand_kernel[(tiles.shape[0], num_blocks)](
            *(v, v.stride(1), v.stride(0), self.rank_stride),
            *(out, out.stride(0), 0 if shared else self.first_column),
            *(table.weights, offsets, table.ranks),
            *self._site_arguments(dropout),
            *(tiles, self.batch.token_idx),
            *self._module_arguments(out_widths),
            self.size,
            SHARED=shared,
            DROPOUT=dropout is not None,
            SPLITS=v.shape[0],
            BLOCK_M=config.rows,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
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
        """Adds `leftᵀ right` to the flat gradients; `left` is scratch of `shrink`."""
        table, (_, segments) = self.table, self.batch.tables
        dropout = self.dropout if shared else None
        config = self.config(dropped=dropout is not None)
        block_r, block_c = config.grad
        num_rank_blocks = triton.cdiv(self.max_rank, block_r)
        num_blocks = _num_blocks(widths, block_c, shared)
        grid = (segments.shape[0], num_blocks, num_rank_blocks * (self.size if shared else 1))
        weight_grad_kernel[grid](
            *(left, left.stride(1), left.stride(0), self.rank_stride, right, right.stride(0)),
            *(0 if shared else self.first_column, grad_pointers, table.base),
            *(offsets, table.ranks),
            *self._site_arguments(dropout),
            *(segments, self.batch.token_idx),
            *self._module_arguments(widths),
            num_rank_blocks,
            SHARED=shared,
            DROPOUT=dropout is not None,
            SPLITS=left.shape[0],
            BLOCK_M=max(32, config.rows),
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=8 if block_r >= 32 else 4,
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
    max_rank = batch.max_rank(table)
    if max_rank == 0:
        return []
    calls, column = [], 0
    for start in range(0, len(modules), MAX_GROUP):
        part = tuple(widths[start : start + MAX_GROUP])
        members = modules[start : start + MAX_GROUP]
        calls.append(_Call(table, batch, dropout, layer, members, part, column, max_rank, x.dtype, x.device))
        column += sum(part)
    return calls


def _num_blocks(widths: tuple[int, ...], columns: int, shared: bool) -> int:
    """Blocks of the wide axis: of all modules side by side, or of the columns that they share."""
    return triton.cdiv(widths[0], columns) if shared else sum(triton.cdiv(w, columns) for w in widths)


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
