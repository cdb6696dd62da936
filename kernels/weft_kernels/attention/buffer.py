"""Device memory of fixed place and size for the tables of attention batches.

A CUDA graph repeats launches with the addresses and grids that it was captured with. Captured over the batch
of an `AttentionBuffer`, it computes whatever batch the buffer was last filled with: programs past its rows,
parts and tiles end at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft_kernels.attention.batch import AttentionBatch, AttentionChunk, DecodeRow
from weft_kernels.attention.tables import (
    CHUNK_WIDTH,
    LARGE_TILE,
    PART_WIDTH,
    ROW_WIDTH,
    SMALL_TILE,
    TILE_WIDTH,
    AttentionTables,
    ChunkTables,
    DecodeTables,
    TableShape,
    filled,
    list_chunks,
    list_decode,
    list_query_tiles,
)
from weft_kernels.transfer import upload

_ALIGNED = 4
_NO_TILE = (-1, 0)


@dataclass(frozen=True, slots=True)
class AttentionRoom:
    """What a buffer holds: `num_rows` rows of a flat batch, of which `max_decode` may be decode rows and the
    others form `max_chunks` chunks, and `max_blocks` blocks of either kind."""

    num_rows: int
    max_decode: int
    max_chunks: int
    max_blocks: int


class AttentionBuffer:
    """Tables with room for `room`, empty at first.

    Raises:
        ValueError: no room for anything.
    """

    def __init__(self, room: AttentionRoom, shape: TableShape, device: torch.device) -> None:
        if min(room.num_rows, room.max_decode, room.max_chunks, room.max_blocks) < 1:
            raise ValueError(f"no tables for {room}")
        self.room = room
        self._shape = shape
        self._device = device
        self._tile_rows = SMALL_TILE if room.num_rows * shape.group <= SMALL_TILE else LARGE_TILE
        self._sizes = {
            "rows": room.max_decode * ROW_WIDTH,
            "parts": (room.max_decode + shape.num_programs) * PART_WIDTH,
            "chunks": room.max_chunks * CHUNK_WIDTH,
            "query_tiles": (room.num_rows // self._tile_tokens + room.max_chunks) * TILE_WIDTH,
        }
        self._num_table_values = sum(map(_aligned, self._sizes.values()))
        self._values = torch.zeros(self._num_table_values + room.max_blocks, dtype=torch.int32, device=device)
        self._chunk_blocks = torch.zeros(room.max_blocks, dtype=torch.int64, device=device)
        self._decode_tables, self._chunk_tables = self._make_tables()
        self.fill(AttentionBatch((), ()))

    @property
    def _tile_tokens(self) -> int:
        return self._tile_rows // self._shape.group

    def _make_tables(self) -> tuple[DecodeTables, ChunkTables]:
        views: dict[str, Tensor] = {}
        first = 0
        for name, size in self._sizes.items():
            views[name] = self._values[first : first + size]
            first += _aligned(size)
        decode = DecodeTables(
            views["rows"].view(-1, ROW_WIDTH),
            views["parts"].view(-1, PART_WIDTH),
            self._values[first:],
            is_split=True,
        )
        tiles = views["query_tiles"].view(-1, TILE_WIDTH)
        chunks = ChunkTables(
            self._tile_rows,
            self._shape.tile_keys,
            views["chunks"].view(-1, CHUNK_WIDTH),
            tiles,
            tiles[:0],
            self._chunk_blocks,
        )
        return decode, chunks

    def batch(self, *, has_chunks: bool) -> AttentionBatch:
        """The batch of `num_rows` rows to capture: what the buffer holds when the launches run. Without
        chunks, decode rows alone are computed."""
        tables = AttentionTables(self._decode_tables, self._chunk_tables if has_chunks else None)
        batch = AttentionBatch((), (), num_padding=self.room.num_rows)
        batch.once(self._shape, lambda: tables)
        return batch

    def holds(self, batch: AttentionBatch) -> bool:
        """Whether there is room for it."""
        room = self.room
        return (
            batch.num_rows <= room.num_rows
            and len(batch.decode) <= room.max_decode
            and len(batch.chunks) <= room.max_chunks
            and sum(len(row.block_ids) for row in batch.decode) <= room.max_blocks
            and sum(len(chunk.block_ids) for chunk in batch.chunks) <= room.max_blocks
        )

    def fill(self, batch: AttentionBatch) -> None:
        """Replace what is there, by copies on the current stream: after all launches that read it before.

        Raises:
            ValueError: a batch that the buffer does not hold.
        """
        if not self.holds(batch):
            raise ValueError(f"a batch of {batch.num_rows} rows does not fit {self.room}")
        rows, parts, block_ids = self._decode_values(batch.decode)
        chunks, tiles = self._chunk_values(batch.chunks)
        values: list[int] = []
        for table in (rows, parts, chunks, tiles):
            values += table
            values += [0] * (_aligned(len(table)) - len(table))
        values += block_ids
        self._values[: len(values)].copy_(upload(values, torch.int32, self._device), non_blocking=True)
        if batch.chunks:
            blocks = torch.cat([chunk.block_ids for chunk in batch.chunks])
            self._chunk_blocks[: len(blocks)].copy_(blocks)

    def _decode_values(self, decode: Sequence[DecodeRow]) -> tuple[list[int], list[int], list[int]]:
        rows, parts, block_ids = [], [], []
        if decode:
            listed = list_decode(decode, self._shape)
            rows, parts, block_ids = listed.rows, listed.parts, listed.block_ids
        return (
            filled(rows, self.room.max_decode, (0,) * ROW_WIDTH),
            filled(parts, self._decode_tables.parts.shape[0], _NO_TILE),
            block_ids,
        )

    def _chunk_values(self, chunks: Sequence[AttentionChunk]) -> tuple[list[int], list[int]]:
        tiles = list_query_tiles(chunks, self._tile_tokens)
        return (
            filled(list_chunks(chunks), self.room.max_chunks, (0,) * CHUNK_WIDTH),
            filled(tiles, self._chunk_tables.query_tiles.shape[0], _NO_TILE),
        )


def _aligned(size: int) -> int:
    """Values up to the next multiple of 16 bytes."""
    return -(-size // _ALIGNED) * _ALIGNED
