"""What the kernels read of a batch: small integer tables on the device, uploaded together once per iteration.

Sizes are rounded up to capacities, and what fills them up says that it is nothing (a length of 0, a chunk or
row of -1), on which a program exits at once. So grids take few sizes, and tables of a fixed capacity serve a
captured graph (`buffer.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft_kernels.attention.batch import AttentionBatch, AttentionChunk, DecodeRow
from weft_kernels.transfer import upload

SMALL_TILE, LARGE_TILE = 64, 128
"""Rows (tokens times the query heads of a group) of a tile of queries: large unless all chunks are short."""
MAX_HEAD_DIM = 128
"""Elements of a head that fit a tile."""
MAX_PARTS = 32
"""Parts that the keys of one decode row are split into, at most."""
MIN_PART_KEYS = 256
"""A shorter part would mostly be filling and draining its pipeline."""
ROW_WIDTH, PART_WIDTH, CHUNK_WIDTH, TILE_WIDTH = 5, 2, 5, 2
_ALIGNED = 4
"""int32 values in 16 bytes: Triton compiles a kernel anew for pointers of another alignment."""
_NOTHING = (-1, 0)


@dataclass(frozen=True, slots=True)
class TableShape:
    """What the tables of a batch depend on beside the batch.

    group: query heads to a key head. tile_keys: keys of a tile. num_programs: programs a key head should have
    for all multiprocessors to have work: into about as many parts the keys of all decode rows are split.
    """

    group: int
    tile_keys: int
    num_programs: int


@dataclass(frozen=True, slots=True)
class DecodeTables:
    """Of the decode rows of a batch, int32.

    Attributes:
        rows: `[S, 5]`: num_keys, where the row's blocks begin in `block_ids`, its first part, the number of
            its parts, the keys of a part; zeros where there is no row.
        parts: `[P, 2]`: row, and which of its parts; a row of -1 where there is none.
        block_ids: `[·]`: the rows' blocks, one row behind the other.
        is_split: whether a row may have more than one part.
    """

    rows: Tensor
    parts: Tensor
    block_ids: Tensor
    is_split: bool


@dataclass(frozen=True, slots=True)
class ChunkTables:
    """Of the chunks of a batch.

    Attributes:
        chunks: `[C, 5]` int32: row_start, num_tokens, num_keys, key_offset, and where the chunk's blocks
            begin in `block_ids` `[·]` int64.
        query_tiles: `[·, 2]` int32: chunk and first token of tiles of `tile_rows` rows, most keys first.
        key_tiles: `[·, 2]` int32: chunk and first key of tiles of `tile_keys` keys, most rows first; empty
            where there is no backward.
    """

    tile_rows: int
    tile_keys: int
    chunks: Tensor
    query_tiles: Tensor
    key_tiles: Tensor
    block_ids: Tensor


@dataclass(frozen=True, slots=True)
class AttentionTables:
    """Both parts of a batch; None where it has no such rows."""

    decode: DecodeTables | None
    chunks: ChunkTables | None

    @staticmethod
    def build(batch: AttentionBatch, device: torch.device, shape: TableShape) -> AttentionTables:
        """The tables of a batch, from one upload (and, where there are chunks, one concatenation of their
        blocks on the device)."""
        packed = _Packed()
        parts: dict[str, tuple[int, int, int]] = {}
        if batch.decode:
            listed = list_decode(batch.decode, shape)
            rows = filled(listed.rows, capacity(len(batch.decode)), (0,) * ROW_WIDTH)
            parts["rows"] = packed.add(rows, ROW_WIDTH)
            num_parts = len(listed.parts) // PART_WIDTH
            parts["parts"] = packed.add(filled(listed.parts, capacity(num_parts), _NOTHING), PART_WIDTH)
            parts["block_ids"] = packed.add(listed.block_ids, 1)
        if batch.chunks:
            chunks = filled(list_chunks(batch.chunks), capacity(len(batch.chunks)), (0,) * CHUNK_WIDTH)
            parts["chunks"] = packed.add(chunks, CHUNK_WIDTH)
            tile_rows = _tile_rows(batch.chunks, shape.group)
            for name, tiles in (
                ("query_tiles", list_query_tiles(batch.chunks, tile_rows // shape.group)),
                ("key_tiles", _list_key_tiles(batch.chunks, shape.tile_keys)),
            ):
                num_tiles = len(tiles) // TILE_WIDTH
                parts[name] = packed.add(filled(tiles, capacity(num_tiles), _NOTHING), TILE_WIDTH)
        values = upload(packed.values, torch.int32, device)
        tables = {
            name: values[first : first + size].view(-1, width) for name, (first, size, width) in parts.items()
        }
        decode = chunk_tables = None
        if batch.decode:
            block_ids = tables["block_ids"].flatten()
            is_split = num_parts > len(batch.decode)
            decode = DecodeTables(tables["rows"], tables["parts"], block_ids, is_split)
        if batch.chunks:
            chunk_tables = ChunkTables(
                tile_rows,
                shape.tile_keys,
                tables["chunks"],
                tables["query_tiles"],
                tables["key_tiles"],
                torch.cat([chunk.block_ids for chunk in batch.chunks]),
            )
        return AttentionTables(decode, chunk_tables)


def capacity(count: int) -> int:
    """A power of two up to 64, then a multiple of 64."""
    return 1 << (count - 1).bit_length() if count <= 64 else -(-count // 64) * 64


def filled(values: list[int], num_rows: int, nothing: Sequence[int]) -> list[int]:
    """A table's values and behind them as many rows of `nothing` as make it `num_rows` long."""
    width = len(nothing)
    return values + [*nothing] * (num_rows - len(values) // width)


class _Packed:
    """Tables one behind the other, each aligned."""

    def __init__(self) -> None:
        self.values: list[int] = []

    def add(self, values: Sequence[int], width: int) -> tuple[int, int, int]:
        """Append a table of rows of `width`; returns where it begins, its size and its width."""
        first = len(self.values)
        self.values += values
        self.values += [0] * (-len(self.values) % _ALIGNED)
        return first, len(values), width


# ---------------------------------------------------------------- decode rows


@dataclass(frozen=True, slots=True)
class DecodeLists:
    """The values of `DecodeTables`, row after row, without padding."""

    rows: list[int]
    parts: list[int]
    block_ids: list[int]


def list_decode(decode: Sequence[DecodeRow], shape: TableShape) -> DecodeLists:
    """The tables of these rows, at least one."""
    part_keys = keys_per_part([row.num_keys for row in decode], shape)
    rows: list[int] = []
    parts: list[tuple[int, int]] = []
    block_ids: list[int] = []
    for idx, row in enumerate(decode):
        num_parts = -(-row.num_keys // part_keys)
        rows += (row.num_keys, len(block_ids), len(parts), num_parts, part_keys)
        parts += [(idx, part) for part in range(num_parts)]
        block_ids += row.block_ids
    return DecodeLists(rows, [value for part in parts for value in part], block_ids)


def keys_per_part(lengths: Sequence[int], shape: TableShape) -> int:
    """Keys of a part: the rows' keys together make about `num_programs` parts, none shorter than 256 keys nor
    one of more than 32 of its row. So there are at most `num_programs` parts more than rows."""
    even_share = -(-sum(lengths) // shape.num_programs)
    keys = max(MIN_PART_KEYS, even_share, -(-max(lengths) // MAX_PARTS))
    return -(-keys // shape.tile_keys) * shape.tile_keys


# ---------------------------------------------------------------- chunks


def list_chunks(chunks: Sequence[AttentionChunk]) -> list[int]:
    """The values of `ChunkTables.chunks`, without padding."""
    values, block_start = [], 0
    for chunk in chunks:
        values += [chunk.row_start, chunk.num_tokens, chunk.num_keys, chunk.key_offset, block_start]
        block_start += len(chunk.block_ids)
    return values


def _tile_rows(chunks: Sequence[AttentionChunk], group: int) -> int:
    longest = max(chunk.num_tokens for chunk in chunks)
    return SMALL_TILE if longest * group <= SMALL_TILE else LARGE_TILE


def list_query_tiles(chunks: Sequence[AttentionChunk], tile_tokens: int) -> list[int]:
    """The values of `ChunkTables.query_tiles`, without padding: the longest programs start first."""
    tiles = [
        (chunk.num_keys - chunk.num_tokens + first, idx, first)
        for idx, chunk in enumerate(chunks)
        for first in range(0, chunk.num_tokens, tile_tokens)
    ]
    return [value for _, idx, first in sorted(tiles, reverse=True) for value in (idx, first)]


def _list_key_tiles(chunks: Sequence[AttentionChunk], tile_keys: int) -> list[int]:
    tiles = [
        (min(chunk.num_tokens, chunk.num_keys - first), idx, first)
        for idx, chunk in enumerate(chunks)
        for first in range(0, chunk.num_keys, tile_keys)
    ]
    return [value for _, idx, first in sorted(tiles, reverse=True) for value in (idx, first)]
