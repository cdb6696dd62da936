"""What the kernels read of a batch: small integer tables on the device, uploaded together once per iteration.

Sizes are rounded up to capacities, and what fills them up says that it is nothing (a length of 0, a chunk of
-1), on which a program exits at once. So grids take few sizes, and tables copied into fixed buffers of such a
capacity serve a captured graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft_kernels.attention.batch import AttentionBatch, AttentionChunk
from weft_kernels.transfer import upload

SMALL_TILE, LARGE_TILE = 64, 128
"""Rows (tokens times the query heads of a group) of a tile of queries: large unless all chunks are short."""
MAX_HEAD_DIM = 128
"""Elements of a head that fit a tile."""
_ALIGNED = 4
"""int32 values in 16 bytes: Triton compiles a kernel anew for pointers of another alignment."""
_NOTHING = (-1, 0)


@dataclass(frozen=True, slots=True)
class DecodeTables:
    """Of `num_rows` decode rows: `lengths` `[S]` int32, S a capacity, 0 where there is no row; `block_ids`
    `[S, width]` int32; `max_keys`, a power of two, is exceeded by no row."""

    num_rows: int
    max_keys: int
    lengths: Tensor
    block_ids: Tensor


@dataclass(frozen=True, slots=True)
class ChunkTables:
    """Of the chunks of a batch.

    Attributes:
        chunks: `[C, 5]` int32: row_start, num_tokens, num_keys, key_offset, and where the chunk's blocks
            begin in `block_ids` `[·]` int64.
        query_tiles: `[·, 2]` int32: chunk and first token of tiles of `tile_rows` rows, most keys first.
        key_tiles: `[·, 2]` int32: chunk and first key of tiles of `tile_keys` keys, most rows first.
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
    def build(batch: AttentionBatch, device: torch.device, *, group: int, tile_keys: int) -> AttentionTables:
        """The tables of a batch for `group` query heads to a key head, from one upload (and, where there are
        chunks, one concatenation of their blocks on the device)."""
        packed = _Packed()
        parts: dict[str, tuple[int, int, int]] = {}
        if batch.decode:
            num_rows = capacity(len(batch.decode))
            width = capacity(max(len(row.block_ids) for row in batch.decode))
            lengths = [row.num_keys for row in batch.decode]
            parts["lengths"] = packed.add(lengths + [0] * (num_rows - len(lengths)), 1)
            parts["block_ids"] = packed.add(_padded_rows(batch, num_rows, width), width)
        if batch.chunks:
            parts["chunks"] = packed.add(_chunk_values(batch.chunks), 5)
            tile_rows = _tile_rows(batch.chunks, group)
            parts["query_tiles"] = packed.add(_query_tiles(batch.chunks, tile_rows // group), 2)
            parts["key_tiles"] = packed.add(_key_tiles(batch.chunks, tile_keys), 2)
        values = upload(packed.values, torch.int32, device)
        tables = {
            name: values[first : first + size].view(-1, width) for name, (first, size, width) in parts.items()
        }
        decode = chunks = None
        if batch.decode:
            longest = max(row.num_keys for row in batch.decode)
            lengths_table = tables["lengths"].flatten()
            decode = DecodeTables(
                len(batch.decode), 1 << (longest - 1).bit_length(), lengths_table, tables["block_ids"]
            )
        if batch.chunks:
            block_ids = torch.cat([chunk.block_ids for chunk in batch.chunks])
            chunks = ChunkTables(
                tile_rows,
                tile_keys,
                tables["chunks"],
                tables["query_tiles"],
                tables["key_tiles"],
                block_ids,
            )
        return AttentionTables(decode, chunks)


def capacity(count: int) -> int:
    """A power of two up to 64, then a multiple of 64."""
    return 1 << (count - 1).bit_length() if count <= 64 else -(-count // 64) * 64


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


def _padded_rows(batch: AttentionBatch, num_rows: int, width: int) -> list[int]:
    values: list[int] = []
    for row in batch.decode:
        values += row.block_ids
        values += [0] * (width - len(row.block_ids))
    return values + [0] * (width * (num_rows - len(batch.decode)))


def _chunk_values(chunks: Sequence[AttentionChunk]) -> list[int]:
    values, block_start = [], 0
    for chunk in chunks:
        values += [chunk.row_start, chunk.num_tokens, chunk.num_keys, chunk.key_offset, block_start]
        block_start += len(chunk.block_ids)
    return values + [0] * (5 * (capacity(len(chunks)) - len(chunks)))


def _tile_rows(chunks: Sequence[AttentionChunk], group: int) -> int:
    longest = max(chunk.num_tokens for chunk in chunks)
    return SMALL_TILE if longest * group <= SMALL_TILE else LARGE_TILE


def _query_tiles(chunks: Sequence[AttentionChunk], tile_tokens: int) -> list[int]:
    """The programs that take longest start first."""
    tiles = [
        (chunk.num_keys - chunk.num_tokens + first, idx, first)
        for idx, chunk in enumerate(chunks)
        for first in range(0, chunk.num_tokens, tile_tokens)
    ]
    return _tile_values([(idx, first) for _, idx, first in sorted(tiles, reverse=True)])


def _key_tiles(chunks: Sequence[AttentionChunk], tile_keys: int) -> list[int]:
    tiles = [
        (min(chunk.num_tokens, chunk.num_keys - first), idx, first)
        for idx, chunk in enumerate(chunks)
        for first in range(0, chunk.num_keys, tile_keys)
    ]
    return _tile_values([(idx, first) for _, idx, first in sorted(tiles, reverse=True)])


def _tile_values(tiles: list[tuple[int, int]]) -> list[int]:
    tiles += [_NOTHING] * (capacity(len(tiles)) - len(tiles))
    return [value for tile in tiles for value in tile]
