"""Attention tables of fixed place and size: what was filled in last is all that is there."""

from __future__ import annotations

import pytest
import torch

from weft_kernels.attention import AttentionBatch, AttentionBuffer, AttentionRoom, DecodeRow, make_chunk
from weft_kernels.attention.tables import AttentionTables, ChunkTables, DecodeTables, TableShape

CPU = torch.device("cpu")
ROOM = AttentionRoom(num_rows=300, max_decode=6, max_chunks=4, max_blocks=200)
SHAPE = TableShape(group=2, tile_keys=32, num_programs=9)
NOTHING = torch.tensor([-1, 0], dtype=torch.int32)


def tables_of(buffer: AttentionBuffer) -> tuple[DecodeTables, ChunkTables]:
    def built() -> AttentionTables:
        raise AssertionError("the batch of a buffer has its tables")

    tables = buffer.batch(has_chunks=True).once(SHAPE, built)
    assert tables.decode is not None
    assert tables.chunks is not None
    return tables.decode, tables.chunks


def a_batch(lengths: list[int], chunk_tokens: list[int]) -> AttentionBatch:
    rows = [DecodeRow(range(i, i + -(-length // 16)), length) for i, length in enumerate(lengths)]
    chunks, row = [], len(rows)
    for i, count in enumerate(chunk_tokens):
        blocks = torch.arange(100 + 20 * i, 120 + 20 * i)
        chunks.append(make_chunk(row, count, 2 * i, count + 5 + 2 * i, blocks, 16))
        row += count
    return AttentionBatch(rows, chunks)


LARGE = a_batch([900, 17, 300, 1, 40, 600], [100, 3, 129, 10])
SMALL = a_batch([33, 5], [40])
DECODE = a_batch([700], [])
CHUNKS = a_batch([], [2])


@pytest.mark.parametrize("batch", [LARGE, SMALL, DECODE, CHUNKS], ids=["large", "small", "decode", "chunks"])
def test_a_filled_buffer_holds_the_batchs_tables_and_behind_them_nothing(batch: AttentionBatch) -> None:
    buffer = AttentionBuffer(ROOM, SHAPE, CPU)
    decode, chunks = tables_of(buffer)
    buffer.fill(LARGE)
    buffer.fill(batch)
    expected = AttentionTables.build(batch, CPU, SHAPE)
    num_decode, num_chunks = len(batch.decode), len(batch.chunks)
    assert not decode.rows[num_decode:].any()
    assert not chunks.chunks[num_chunks:].any()
    parts = decode.parts[decode.parts[:, 0] >= 0]
    tiles = chunks.query_tiles[chunks.query_tiles[:, 0] >= 0]
    for table, used in ((decode.parts, len(parts)), (chunks.query_tiles, len(tiles))):
        assert torch.equal(table[used:], NOTHING.expand(len(table) - used, 2))
    if expected.decode is None:
        assert len(parts) == 0
    else:
        assert torch.equal(decode.rows[:num_decode], expected.decode.rows[:num_decode])
        assert torch.equal(parts, expected.decode.parts[: len(parts)])
        assert not (expected.decode.parts[len(parts) :, 0] >= 0).any()
        num_blocks = len(expected.decode.block_ids)
        assert torch.equal(decode.block_ids[:num_blocks], expected.decode.block_ids)
    if expected.chunks is None:
        assert len(tiles) == 0
    else:
        assert torch.equal(chunks.chunks[:num_chunks], expected.chunks.chunks[:num_chunks])
        num_blocks = len(expected.chunks.block_ids)
        assert torch.equal(chunks.block_ids[:num_blocks], expected.chunks.block_ids)
        tokens = chunks.tile_rows // SHAPE.group
        counts = [chunk.num_tokens for chunk in batch.chunks]
        listed = [(idx, first) for idx, count in enumerate(counts) for first in range(0, count, tokens)]
        assert sorted(map(tuple, tiles.tolist())) == listed


def test_a_buffer_is_empty_at_first() -> None:
    decode, chunks = tables_of(AttentionBuffer(ROOM, SHAPE, CPU))
    assert not decode.rows.any()
    assert (decode.parts[:, 0] == -1).all()
    assert (chunks.query_tiles[:, 0] == -1).all()


def test_tables_begin_on_16_byte_boundaries_and_rows_may_be_split() -> None:
    """Else kernels would be compiled anew for the buffer."""
    decode, chunks = tables_of(AttentionBuffer(ROOM, SHAPE, CPU))
    for table in (decode.rows, decode.parts, decode.block_ids, chunks.chunks, chunks.query_tiles):
        assert table.storage_offset() % 4 == 0
    assert decode.is_split
    assert chunks.tile_rows == 128
    small = AttentionRoom(num_rows=32, max_decode=6, max_chunks=4, max_blocks=200)
    assert tables_of(AttentionBuffer(small, SHAPE, CPU))[1].tile_rows == 64


@pytest.mark.parametrize(
    "batch",
    [
        a_batch([1], [300]),
        a_batch([1] * 7, []),
        a_batch([], [1] * 5),
        a_batch([3201], []),
    ],
    ids=["rows", "decode rows", "chunks", "blocks"],
)
def test_what_does_not_fit_is_refused(batch: AttentionBatch) -> None:
    buffer = AttentionBuffer(ROOM, SHAPE, CPU)
    assert buffer.holds(LARGE)
    assert not buffer.holds(batch)
    with pytest.raises(ValueError, match="does not fit"):
        buffer.fill(batch)


def test_a_buffer_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="no tables"):
        AttentionBuffer(AttentionRoom(4, 0, 1, 1), SHAPE, CPU)
