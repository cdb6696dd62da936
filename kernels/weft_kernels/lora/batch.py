"""Which rows of a flat token batch use which adapter slot, sorted once per iteration.

Owns the permutation of rows and the tile tables of the Triton kernels. Knows neither weights nor requests.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft_kernels.lora.buffer import LoraBuffer
from weft_kernels.lora.table import LoraTable
from weft_kernels.transfer import upload_indices

_MIN_TILE_ROWS, _MAX_TILE_ROWS = 16, 64
MAX_FEW_ROWS = 8
"""Rows of a segment up to which calling a product takes longer than computing it, on a CPU."""


@dataclass(frozen=True, slots=True)
class FewRows:
    """The segments of few rows (decoding, mostly): their slots and numbers of rows, ascending by slot.

    rows: the rows of the batch, segment after segment: a slice where they are one run, else an int64 index.
    segments: `(slot, rows)` of each.
    """

    slots: tuple[int, ...]
    counts: tuple[int, ...]
    rows: slice | Tensor
    segments: tuple[tuple[int, slice | Tensor], ...]


@dataclass(frozen=True, slots=True)
class EvenRun:
    """Segments of equal length that follow one another in the batch: `first` is their first row, `length`
    that of each."""

    first: int
    length: int


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Which segments the reference multiplies together: `few` are those of few rows, or None; `many` the
    `(slot, rows)` of the others, and `even` how those lie, if that is one run of equal lengths."""

    few: FewRows | None
    many: tuple[tuple[int, slice | Tensor], ...]
    even: EvenRun | None


class LoraBatch:
    """The adapter rows of one flat batch [T, ...]; immutable.

    Attributes:
        segments: `(slot, start, end)` ranges into `token_idx`, one per slot, ascending by slot.
        rows: per segment the rows of the batch: a slice where they are one contiguous run, else an int64
        index. token_idx: int64 [P] on the device, the rows sorted by slot, in the order of the runs within a
        slot. num_rows: P, the number of rows that use an adapter.
        max_row: the highest row used, for bounds checks.

    Built over a `LoraBuffer`, `token_idx` and the tables are the buffer's: longer than needed, with zeros and
    empty tiles at the end, and overwritten by whatever fills it next.
    """

    __slots__ = (
        "_fixed_rank",
        "_grad_pointers",
        "_groups",
        "_max_rank",
        "_runs_by_slot",
        "_tables",
        "max_row",
        "num_rows",
        "rows",
        "segments",
        "tile_rows",
        "token_idx",
    )

    def __init__(
        self,
        runs_by_slot: Mapping[int, list[tuple[int, int]]],
        device: torch.device,
        buffer: LoraBuffer | None = None,
        max_rank: int | None = None,
    ) -> None:
        self._tables: tuple[Tensor, Tensor] | None
        segments: list[tuple[int, int, int]] = []
        index: list[int] = []
        for slot in sorted(runs_by_slot):
            start = len(index)
            for first, last in runs_by_slot[slot]:
                index.extend(range(first, last))
            segments.append((slot, start, len(index)))
        self.segments = tuple(segments)
        self.num_rows = len(index)
        self.max_row = max(index)
        self.tile_rows = _tile_rows(max(end - start for _, start, end in segments))
        if buffer is not None:
            self.tile_rows = buffer.tile_rows
            buffer.fill(index, self._tile_values(self.tile_rows), self._segment_values())
            self.token_idx = buffer.token_idx
            self._tables = (buffer.tiles, buffer.segments)
        elif device.type == "cpu":
            self.token_idx = upload_indices(index, device)
            self._tables = None
        else:
            first = _padded(len(index))
            values = index + [0] * (first - len(index)) + self._table_values()
            packed = upload_indices(values, device)
            self.token_idx = packed[: self.num_rows]
            self._tables = self._split_tables(packed[first:])
        self.rows: tuple[slice | Tensor, ...] = tuple(
            slice(*runs_by_slot[slot][0]) if len(runs_by_slot[slot]) == 1 else self.token_idx[start:end]
            for slot, start, end in self.segments
        )
        self._grad_pointers: tuple[tuple[int, ...], Tensor] | None = None
        self._max_rank: tuple[LoraTable, int, int] | None = None
        self._fixed_rank = max_rank
        self._runs_by_slot = runs_by_slot
        self._groups: RowGroups | None = None

    @property
    def groups(self) -> RowGroups:
        """Made on first use: the kernels do without."""
        if self._groups is None:
            many = tuple(
                (slot, rows)
                for (slot, start, end), rows in zip(self.segments, self.rows, strict=True)
                if end - start > MAX_FEW_ROWS
            )
            self._groups = RowGroups(self._few_rows(), many, _even_run([rows for _, rows in many]))
        return self._groups

    def _few_rows(self) -> FewRows | None:
        few = [
            (slot, end - start, rows)
            for (slot, start, end), rows in zip(self.segments, self.rows, strict=True)
            if end - start <= MAX_FEW_ROWS
        ]
        if not few:
            return None
        slots = tuple(slot for slot, _, _ in few)
        return FewRows(
            slots=slots,
            counts=tuple(count for _, count, _ in few),
            segments=tuple((slot, rows) for slot, _, rows in few),
            rows=self.rows_of(slots),
        )

    def rows_of(self, slots: Sequence[int]) -> slice | Tensor:
        """The rows of these slots, one slot after the other: a slice where they are one run, else int64."""
        index = [row for slot in slots for run in self._runs_by_slot[slot] for row in range(*run)]
        is_run = index == list(range(index[0], index[0] + len(index)))
        return slice(index[0], index[-1] + 1) if is_run else upload_indices(index, self.token_idx.device)

    @staticmethod
    def build(
        runs: Sequence[tuple[int, int, int]],
        device: torch.device | str,
        buffer: LoraBuffer | None = None,
        max_rank: int | None = None,
    ) -> "LoraBatch | None":
        """Sort runs `(slot, row_start, num_rows)` by slot; None if they hold no row at all.

        Rows of one slot may come in several runs; rows that use no adapter are simply absent. `max_rank` is
        what launches are sized for, in place of the largest rank in the batch, which may not exceed it: for
        graphs that serve later batches.

        Raises:
            ValueError: a negative slot, row or length, two runs that share a row, or more than `buffer`
                holds.
        """
        by_slot: dict[int, list[tuple[int, int]]] = {}
        for slot, start, length in runs:
            if slot < 0 or start < 0 or length < 0:
                raise ValueError(f"negative value in run {(slot, start, length)}")
            if length == 0:
                continue
            slot_runs = by_slot.setdefault(slot, [])
            if slot_runs and slot_runs[-1][1] == start:
                slot_runs[-1] = (slot_runs[-1][0], start + length)
            else:
                slot_runs.append((start, start + length))
        if not by_slot:
            return None
        _check_disjoint(run for slot_runs in by_slot.values() for run in slot_runs)
        return LoraBatch(by_slot, torch.device(device), buffer, max_rank)

    def fits(self, buffer: LoraBuffer) -> bool:
        """Whether `copy_to` has room."""
        num_tiles = self._num_tiles(buffer.tile_rows)
        return self.num_rows <= buffer.token_idx.numel() and num_tiles <= buffer.tiles.shape[0]

    def copy_to(self, buffer: LoraBuffer) -> None:
        """Make it the batch of whatever was built, or captured, over `buffer`: by a copy on the current
        stream.

        Raises:
            ValueError: more than the buffer holds.
        """
        index = [
            row for slot, _, _ in self.segments for run in self._runs_by_slot[slot] for row in range(*run)
        ]
        buffer.fill(index, self._tile_values(buffer.tile_rows), self._segment_values())

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Tile table [num_tiles, 3] of `(slot, start, num_rows)` and segment table [num_segments, 3] of
        `(slot, start, num_rows)`, both int64 on the device; starts index `token_idx`."""
        if self._tables is None:
            values = upload_indices(self._table_values(), self.token_idx.device)
            self._tables = self._split_tables(values)
        return self._tables

    def grad_pointers(self, grads: Mapping[int, Tensor]) -> Tensor:
        """Address of each segment's flat gradient, int64, one per row of the segment table; 0 for slots
        absent from `grads` and for padding."""
        addresses = tuple(grads[slot].data_ptr() if slot in grads else 0 for slot, _, _ in self.segments)
        addresses += (0,) * (self.tables[1].shape[0] - len(addresses))
        if self._grad_pointers is None or self._grad_pointers[0] != addresses:
            self._grad_pointers = (addresses, upload_indices(addresses, self.token_idx.device))
        return self._grad_pointers[1]

    def max_rank(self, table: LoraTable) -> int:
        """The largest rank of any slot in the batch (or what was given in its place); 0 if none of them
        adapts anything."""
        if self._fixed_rank is not None:
            return self._fixed_rank
        known = self._max_rank
        if known is None or known[0] is not table or known[1] != table.version:
            rank = max(table.max_rank(slot) for slot, _, _ in self.segments)
            known = self._max_rank = (table, table.version, rank)
        return known[2]

    def _table_values(self) -> list[int]:
        """Tiles, padding, segments: see `_padded`."""
        tiles = self._tile_values(self.tile_rows)
        return tiles + [0] * (_padded(len(tiles)) - len(tiles)) + self._segment_values()

    def _tile_values(self, tile_rows: int) -> list[int]:
        values: list[int] = []
        for slot, start, end in self.segments:
            for tile in range(start, end, tile_rows):
                values += (slot, tile, min(tile_rows, end - tile))
        return values

    def _num_tiles(self, tile_rows: int) -> int:
        return sum(-(-(end - start) // tile_rows) for _, start, end in self.segments)

    def _segment_values(self) -> list[int]:
        return [value for slot, start, end in self.segments for value in (slot, start, end - start)]

    def _split_tables(self, values: Tensor) -> tuple[Tensor, Tensor]:
        num_tiles = self._num_tiles(self.tile_rows)
        tiles, segments = values[: 3 * num_tiles], values[_padded(3 * num_tiles) :]
        return tiles.view(-1, 3), segments.view(-1, 3)


def _padded(num_values: int) -> int:
    """The length that keeps what follows on a 16-byte boundary. Triton compiles a kernel anew for pointers of
    another alignment, which would stop a serving engine for seconds."""
    return -(-num_values // 2) * 2


def _tile_rows(longest: int) -> int:
    tile = _MIN_TILE_ROWS
    while tile < min(longest, _MAX_TILE_ROWS):
        tile *= 2
    return tile


def _even_run(rows: Sequence[slice | Tensor]) -> EvenRun | None:
    if len(rows) < 2 or not isinstance(rows[0], slice):
        return None
    first, length = rows[0].start, rows[0].stop - rows[0].start
    for i, part in enumerate(rows):
        start = first + i * length
        if not isinstance(part, slice) or (part.start, part.stop) != (start, start + length):
            return None
    return EvenRun(first, length)


def _check_disjoint(runs: Iterable[tuple[int, int]]) -> None:
    previous_end = 0
    for start, end in sorted(runs):
        if start < previous_end:
            raise ValueError(f"row {start} belongs to two runs")
        previous_end = end
