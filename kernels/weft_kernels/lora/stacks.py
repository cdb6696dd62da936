"""Weights of the adapters that decode together, side by side: one product serves them all.

Owns the copies, laid out for the CPU library's GEMM, and when they are stale. For a row of each of 8
adapters a product per adapter and module is mostly the cost of calling it. Stacked, the rows of all adapters
multiply the A's of all, what is foreign to a row is cleared, and the B's follow: at few rows reading the
weights is all that takes time. A row stays its own: foreign products are overwritten, not multiplied by
zero, and foreign B's, which do meet zeros, are finite. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from weft_kernels.prepacked import PrepackedWeight, can_prepack, lay_out

if TYPE_CHECKING:
    from weft_kernels.lora.batch import FewRows, LoraBatch
    from weft_kernels.lora.table import LoraGroup, LoraTable

Pattern: TypeAlias = tuple[tuple[int, int], ...]
MAX_STACK_BYTES = 256 << 20
"""Memory that stacks may take; sets of adapters that are larger are multiplied one by one."""
_MAX_SETS = 64
_CALL_BYTES = 1 << 20
"""Zeros that are multiplied in the time of one more call."""


@dataclass(frozen=True, slots=True)
class BlockStack:
    """Modules `[first_member, end_member)` of a group: their columns `[rank_start, rank_end)` of the stacked
    A's products, and all adapters' B times their scales, [sum of N, sum of ranks], block-diagonal if there
    are several."""

    first_member: int
    end_member: int
    rank_start: int
    rank_end: int
    b: PrepackedWeight


@dataclass(frozen=True, slots=True)
class GroupStack:
    """A fused group of modules: all adapters' A, [sum of ranks, K], module after module, and the
    B's.

    `pattern` holds `(index of the slot, rank)` of every run of columns.
    """

    a: PrepackedWeight
    blocks: tuple[BlockStack, ...]
    pattern: Pattern


@dataclass(slots=True)
class _AdapterSet:
    """What is kept of one set of adapters, from the first batch on that has it."""

    first_batch: LoraBatch
    num_bytes: int
    groups: dict[tuple[int, tuple[int, ...]], GroupStack | None] = field(default_factory=dict)
    foreign: dict[tuple[Pattern, tuple[int, ...]], Tensor] = field(default_factory=dict)


class StackCache:
    """The stacks of the sets of adapters that were seen last, within `MAX_STACK_BYTES`.

    Stale when any weight of the arena, or any row of the table, has been written to since.
    """

    def __init__(self) -> None:
        self._written: tuple[int, int] | None = None
        self._sets: dict[tuple[int, ...], _AdapterSet] = {}

    def find(
        self, batch: LoraBatch, few: FewRows, table: LoraTable, layer: int, modules: tuple[int, ...]
    ) -> GroupStack | None:
        """The stack of a group of modules for these rows of `batch`, or None: multiply them one by one.

        Stacks are made from the second batch on that has these adapters, where they fit, are finite, and the
        library lays weights out.
        """
        if not can_prepack(table.weights.device, table.weights.dtype):
            return None
        written = (table.weights._version, table.version)
        if written != self._written:
            self._written = written
            self._sets.clear()
        found = self._sets.get(few.slots)
        if found is None:
            self._remember(batch, few.slots, table)
            return None
        if found.first_batch is batch or found.num_bytes > MAX_STACK_BYTES:
            return None
        key = (layer, modules)
        if key not in found.groups:
            if not found.groups:
                self._make_room(few.slots)
            found.groups[key] = _stack([table.group(slot, layer, modules) for slot in few.slots])
        return found.groups[key]

    def clear_foreign(self, v: Tensor, stack: GroupStack, few: FewRows) -> Tensor:
        """`v` [rows, sum of ranks] with 0 where the adapter is not the row's; in place."""
        foreign, key = self._sets[few.slots].foreign, (stack.pattern, few.counts)
        if key not in foreign:
            foreign[key] = _foreign_columns(stack.pattern, few.counts)
        return v.masked_fill_(foreign[key], 0.0)

    def _remember(self, batch: LoraBatch, slots: tuple[int, ...], table: LoraTable) -> None:
        """Know a set as seen once; forget the oldest of too many."""
        num_elements = sum(table.num_elements(slot) for slot in slots)
        self._sets[slots] = _AdapterSet(batch, num_elements * table.weights.element_size())
        if len(self._sets) > _MAX_SETS:
            del self._sets[next(iter(self._sets))]

    def _make_room(self, slots: tuple[int, ...]) -> None:
        """Forget the oldest sets that have stacks, until those of `slots` fit; these become the newest."""
        wanted = self._sets.pop(slots)
        stacked = {key: kept.num_bytes for key, kept in self._sets.items() if kept.groups}
        while stacked and sum(stacked.values()) + wanted.num_bytes > MAX_STACK_BYTES:
            oldest = next(iter(stacked))
            del stacked[oldest], self._sets[oldest]
        self._sets[slots] = wanted


def _foreign_columns(pattern: Pattern, counts: tuple[int, ...]) -> Tensor:
    """Which columns are foreign to a row: bool [rows, sum of ranks]."""
    slot_of_row = torch.tensor([idx for idx, count in enumerate(counts) for _ in range(count)])
    slot_of_column = torch.tensor([idx for idx, rank in pattern for _ in range(rank)])
    return slot_of_row.unsqueeze(1) != slot_of_column


def _stack(groups: Sequence[LoraGroup | None]) -> GroupStack | None:
    found = [
        (member, idx, entry)
        for idx, group in enumerate(groups)
        if group is not None
        for member, entry, _, _ in group.members
    ]
    if not found:
        return None
    found.sort(key=lambda item: item[:2])
    stacked_a = torch.cat([entry.a for _, _, entry in found])
    a = lay_out(stacked_a) if bool(stacked_a.isfinite().all()) else None
    if a is None:
        return None
    modules = [
        (member, torch.cat([entry.b * entry.scale for other, _, entry in found if other == member]))
        for member in dict.fromkeys(member for member, _, _ in found)
    ]
    if not all(bool(b.isfinite().all()) for _, b in modules):
        return None
    blocks, column = [], 0
    for run in _runs(modules):
        first, num_ranks = run[0][0], sum(len(b) for _, b in run)
        b = lay_out(_block_diagonal([b for _, b in run]).mT)
        assert b is not None  # as it was for A
        blocks.append(BlockStack(first, first + len(run), column, column + num_ranks, b))
        column += num_ranks
    pattern = tuple((idx, entry.rank) for _, idx, entry in found)
    return GroupStack(a, tuple(blocks), pattern)


def _block_diagonal(matrices: Sequence[Tensor]) -> Tensor:
    if len(matrices) == 1:
        return matrices[0]
    out = matrices[0].new_zeros(sum(len(m) for m in matrices), sum(m.shape[1] for m in matrices))
    row = column = 0
    for matrix in matrices:
        out[row : row + len(matrix), column : column + matrix.shape[1]] = matrix
        row, column = row + len(matrix), column + matrix.shape[1]
    return out


def _runs(modules: Sequence[tuple[int, Tensor]]) -> list[list[tuple[int, Tensor]]]:
    """Neighbouring modules that take less time as one block-diagonal product than as several."""
    runs: list[list[tuple[int, Tensor]]] = []
    for member, b in modules:
        if runs and runs[-1][-1][0] == member - 1:
            matrices = [*(other for _, other in runs[-1]), b]
            size = sum(len(m) for m in matrices) * sum(m.shape[1] for m in matrices)
            if (size - sum(m.numel() for m in matrices)) * b.element_size() <= _CALL_BYTES:
                runs[-1].append((member, b))
                continue
        runs.append([(member, b)])
    return runs
