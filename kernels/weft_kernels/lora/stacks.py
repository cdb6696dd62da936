"""Weights of adapters that decode, side by side: one product serves them all.

Owns the copies, laid out for the CPU library's GEMM, and when they are stale. For a row of each of 8
adapters a product per adapter and module is mostly the cost of calling it. Stacked, the rows of all adapters
multiply the A's of all, what is foreign to a row is cleared, and the B's follow: at few rows reading the
weights is all that takes time. A row stays its own: foreign products are overwritten, not multiplied by
zero, and foreign B's, which do meet zeros, are finite. Knows nothing of requests.

Which adapters decode together changes with every request that comes or ends, and a stack takes longer to
make than several iterations save. So a stack serves any of its adapters, with or without the others; it is
made of those seen lately, once enough products were computed one by one for want of it; and it grows by a
few groups of modules a batch, so that no batch waits for all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from weft_kernels.prepacked import PrepackedWeight, can_prepack, lay_out

if TYPE_CHECKING:
    from weft_kernels.lora.batch import FewRows, LoraBatch
    from weft_kernels.lora.table import LoraGroup, LoraTable

Segments: TypeAlias = tuple[tuple[int, slice | Tensor], ...]
_Pattern: TypeAlias = tuple[tuple[int, int], ...]
MAX_STACK_BYTES = 256 << 20
"""Memory that stacks may take; adapters beyond it are multiplied one by one."""
PATIENCE = 24
"""Adapters that go through a batch one by one, summed over batches, before a stack is made: then they have
taken about as long as making it."""
GROUPS_PER_BATCH = 4
"""Groups of modules that a batch may add to a stack."""
_FEWEST_ADAPTERS = 4
_MAX_RECENT = 64
_MAX_FOREIGN = 256
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

    `pattern` holds `(slot, rank)` of every run of columns.
    """

    a: PrepackedWeight
    blocks: tuple[BlockStack, ...]
    pattern: _Pattern


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of a batch whose adapters a stack has, their slots, and the other segments of few rows."""

    rows: slice | Tensor
    slot_of_row: tuple[int, ...]
    rest: Segments


@dataclass(frozen=True, slots=True)
class Stacked:
    """How a batch uses a stack: `rows` multiply `group`, after which `foreign`, bool [rows, sum of ranks],
    is cleared; the segments of `rest` are in no stack."""

    group: GroupStack
    rows: slice | Tensor
    foreign: Tensor
    rest: Segments


@dataclass(slots=True, eq=False)
class _Stack:
    """Some adapters, at some version of their weights, and the groups of modules that are stacked so far.

    A group is None where it cannot be stacked.
    """

    versions: dict[int, int]
    num_bytes: int
    groups: dict[tuple[int, tuple[int, ...]], GroupStack | None] = field(default_factory=dict)
    foreign: dict[tuple[_Pattern, tuple[int, ...]], Tensor] = field(default_factory=dict)

    def is_current(self, table: LoraTable) -> bool:
        return all(table.slot_version(slot) == version for slot, version in self.versions.items())

    def num_covered(self, slots: Sequence[int]) -> int:
        return sum(slot in self.versions for slot in slots)


class StackCache:
    """The stacks that were used last, within `MAX_STACK_BYTES`. One without an adapter that has changed since
    (`LoraTable.slot_version`) is dropped.
    """

    def __init__(self) -> None:
        self._stacks: list[_Stack] = []
        self._recent: dict[int, int] = {}
        self._num_alone = 0
        self._begun: tuple[LoraBatch, int] | None = None
        self._candidates: list[tuple[_Stack, _Part]] = []
        self._num_addable = 0

    def find(
        self, batch: LoraBatch, few: FewRows, table: LoraTable, layer: int, modules: tuple[int, ...]
    ) -> Stacked | None:
        """The stack of a group of modules for these rows of `batch`, or None: multiply them one by one."""
        if not can_prepack(table.weights.device, table.weights.dtype):
            return None
        begun = self._begun
        if begun is None or begun[0] is not batch or begun[1] != table.version:
            self._begun = (batch, table.version)
            self._begin(batch, few, table)
        key = (layer, modules)
        for stack, part in self._candidates:
            if key not in stack.groups:
                if not self._num_addable:
                    continue
                self._num_addable -= 1
                groups = [(slot, table.group(slot, layer, modules)) for slot in stack.versions]
                stack.groups[key] = _stack([(slot, group) for slot, group in groups if group is not None])
            group = stack.groups[key]
            if group is not None:
                return Stacked(group, part.rows, _foreign(stack, group.pattern, part), part.rest)
        return None

    def _begin(self, batch: LoraBatch, few: FewRows, table: LoraTable) -> None:
        """Find what serves a batch, best first; begin a stack if too many adapters have gone without."""
        self._stacks = [stack for stack in self._stacks if stack.is_current(table)]
        for slot in few.slots:
            self._recent.pop(slot, None)
            self._recent[slot] = table.slot_version(slot)
        while len(self._recent) > _MAX_RECENT:
            del self._recent[next(iter(self._recent))]
        num_covered = max((stack.num_covered(few.slots) for stack in self._stacks), default=0)
        num_alone = len(few.slots) - num_covered
        self._num_alone = self._num_alone + num_alone if num_alone else max(0, self._num_alone - 1)
        if num_alone and self._num_alone >= PATIENCE:
            self._num_alone = 0
            self._add_stack(few.slots, table)
        self._stacks.sort(key=lambda stack: stack.num_covered(few.slots))
        serving = [stack for stack in reversed(self._stacks) if stack.num_covered(few.slots)]
        self._candidates = [(stack, _part(batch, few, stack)) for stack in serving]
        self._num_addable = GROUPS_PER_BATCH

    def _add_stack(self, slots: tuple[int, ...], table: LoraTable) -> None:
        """Begin a stack of these adapters and of those seen before them, as far as they fit."""
        others = [slot for slot in reversed(self._recent) if slot not in slots]
        most, versions, num_bytes = max(_FEWEST_ADAPTERS, 2 * len(slots)), dict[int, int](), 0
        for slot in [*slots, *others][:most]:
            added = table.num_elements(slot) * table.weights.element_size()
            if self._recent[slot] == table.slot_version(slot) and num_bytes + added <= MAX_STACK_BYTES:
                versions[slot] = self._recent[slot]
                num_bytes += added
        if not versions or any(stack.versions == versions for stack in self._stacks):
            return
        while self._stacks and sum(s.num_bytes for s in self._stacks) + num_bytes > MAX_STACK_BYTES:
            del self._stacks[0]
        self._stacks.append(_Stack(versions, num_bytes))


def _part(batch: LoraBatch, few: FewRows, stack: _Stack) -> _Part:
    within = [slot in stack.versions for slot in few.slots]
    counted = zip(few.slots, few.counts, strict=True)
    slot_of_row = tuple(slot for slot, count in counted if slot in stack.versions for _ in range(count))
    if all(within):
        return _Part(few.rows, slot_of_row, ())
    rest = tuple(segment for segment, is_in in zip(few.segments, within, strict=True) if not is_in)
    return _Part(batch.rows_of([slot for slot in few.slots if slot in stack.versions]), slot_of_row, rest)


def _foreign(stack: _Stack, pattern: _Pattern, part: _Part) -> Tensor:
    """Which columns are foreign to a row: bool [rows, sum of ranks]."""
    key = (pattern, part.slot_of_row)
    if key not in stack.foreign:
        if len(stack.foreign) >= _MAX_FOREIGN:
            stack.foreign.clear()
        slot_of_column = torch.tensor([slot for slot, rank in pattern for _ in range(rank)])
        stack.foreign[key] = torch.tensor(part.slot_of_row).unsqueeze(1) != slot_of_column
    return stack.foreign[key]


def _stack(groups: Sequence[tuple[int, LoraGroup]]) -> GroupStack | None:
    found = [(member, slot, entry) for slot, group in groups for member, entry, _, _ in group.members]
    if not found:
        return None
    found.sort(key=lambda item: item[:2])
    modules = [
        (member, torch.cat([entry.b * entry.scale for other, _, entry in found if other == member]))
        for member in dict.fromkeys(member for member, _, _ in found)
    ]
    stacked_a = torch.cat([entry.a for _, _, entry in found])
    if not all(map(_is_finite, [stacked_a, *(b for _, b in modules)])):
        return None
    blocks, column = [], 0
    for run in _runs(modules):
        first, num_ranks = run[0][0], sum(len(b) for _, b in run)
        b = _laid_out(_block_diagonal([b for _, b in run]).mT)
        blocks.append(BlockStack(first, first + len(run), column, column + num_ranks, b))
        column += num_ranks
    return GroupStack(_laid_out(stacked_a), tuple(blocks), tuple((slot, e.rank) for _, slot, e in found))


def _laid_out(weight: Tensor) -> PrepackedWeight:
    laid_out = lay_out(weight)
    assert laid_out is not None  # `can_prepack` said so
    return laid_out


def _is_finite(matrix: Tensor) -> bool:
    """Several times as fast as looking at each element. A sum that overflows counts as one that is not."""
    return isfinite(float(matrix.sum(dtype=torch.float32)))


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
