"""How a batch is cut up: into groups of tiles for the reference, into tables and parts for the kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft_kernels.attention import AttentionBatch, DecodeRow, make_chunk
from weft_kernels.attention.tables import AttentionTables, TableShape, capacity, keys_per_part
from weft_kernels.attention.tiles import MAX_SCORES, group_by_length, tile_groups

CPU = torch.device("cpu")

# ---------------------------------------------------------------- the reference


def test_one_long_sequence_does_not_make_short_ones_read_its_length() -> None:
    lengths = [64] * 31 + [4096]
    rows = [DecodeRow(range(4096 // 16), length) for length in lengths]
    groups = tile_groups(AttentionBatch(rows, ()), 16, None, CPU, num_heads=4, max_decode_keys=1 << 16)
    assert sum(group.num_tiles * group.num_keys for group in groups) == sum(lengths)
    assert len(groups) == 2


def test_short_sequences_of_unequal_length_are_one_call() -> None:
    assert len(group_by_length([60, 25, 64, 40, 33, 50], max_keys=1 << 16)) == 1


@given(
    lengths=st.lists(st.integers(1, 5000), max_size=64),
    max_keys=st.sampled_from([1, 3000, 20_000, 1 << 30]),
)
def test_groups_hold_every_row_once_and_pad_at_most_twofold(lengths: list[int], max_keys: int) -> None:
    groups = group_by_length(lengths, max_keys=max_keys)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[row] for row in group)
        assert padded <= 2 * sum(lengths[row] for row in group) + 128
        assert len(group) == 1 or padded <= max_keys
    if max_keys == 1 << 30:
        assert len(groups) <= 13


@pytest.mark.parametrize("window", [None, 1000])
def test_chunks_are_cut_into_groups_that_fit_the_caches(window: int | None) -> None:
    table = torch.arange(4096 // 16)
    chunks = [make_chunk(600 * i, 600, 0, 3000, table, 16) for i in range(3)]
    groups = tile_groups(AttentionBatch((), chunks), 16, window, CPU, num_heads=32, max_decode_keys=1)
    for group in groups:
        assert group.num_tiles == 1 or group.num_tiles * group.num_rows * group.num_keys * 32 <= MAX_SCORES
        assert group.num_keys <= 1300 or window is None
    rows = torch.cat([torch.arange(1800)[g.rows] if g.real is None else g.rows[g.real] for g in groups])
    assert sorted(rows.tolist()) == list(range(1800))


# ---------------------------------------------------------------- the kernels


@given(
    lengths=st.lists(st.integers(1, 1 << 17), min_size=1, max_size=256),
    num_programs=st.integers(1, 300),
    tile_keys=st.sampled_from([32, 64]),
)
def test_parts_keep_all_multiprocessors_busy_but_are_neither_short_nor_many(
    lengths: list[int], num_programs: int, tile_keys: int
) -> None:
    shape = TableShape(group=4, tile_keys=tile_keys, num_programs=num_programs)
    keys = keys_per_part(lengths, shape)
    counts = [-(-length // keys) for length in lengths]
    assert keys % tile_keys == 0
    assert keys >= 256
    assert max(counts) <= 32
    assert sum(counts) <= len(lengths) + num_programs
    if max(counts) < 32 and sum(lengths) >= 4 * num_programs * (256 + tile_keys):
        assert 2 * sum(counts) > num_programs


def test_tables_hold_every_query_and_key_once_and_are_filled_up_with_nothing() -> None:
    rows = [DecodeRow([3 * i, 3 * i + 1, 3 * i + 2], length) for i, length in enumerate((40, 3, 7))]
    chunks = [
        make_chunk(3, 5, 0, 5, torch.arange(10, 20), 16),
        make_chunk(8, 1, 20, 90, torch.arange(30, 40), 16),
        make_chunk(9, 130, 2, 200, torch.arange(50, 70), 16),
    ]
    shape = TableShape(group=2, tile_keys=32, num_programs=33)
    tables = AttentionTables.build(AttentionBatch(rows, chunks), CPU, shape)
    assert tables.decode is not None
    assert tables.chunks is not None
    expected_rows = [[40, 0, 0, 1, 256], [3, 3, 1, 1, 256], [7, 6, 2, 1, 256], [0] * 5]
    assert tables.decode.rows.tolist() == expected_rows
    assert tables.decode.parts.tolist() == [[0, 0], [1, 0], [2, 0], [-1, 0]]
    assert tables.decode.block_ids.tolist() == list(range(9))
    assert not tables.decode.is_split
    for tiles, size, counts in (
        (tables.chunks.query_tiles, tables.chunks.tile_rows // 2, [c.num_tokens for c in chunks]),
        (tables.chunks.key_tiles, 32, [c.num_keys for c in chunks]),
    ):
        expected = [(idx, i) for idx, count in enumerate(counts) for i in range(0, count, size)]
        listed = [tuple(tile) for tile in tiles.tolist() if tile[0] >= 0]
        assert sorted(listed) == expected
        assert len(tiles) == capacity(len(expected))
    for chunk, values in zip(chunks, tables.chunks.chunks.tolist(), strict=False):
        assert values[:4] == [chunk.row_start, chunk.num_tokens, chunk.num_keys, chunk.key_offset]
        first = values[4]
        assert torch.equal(tables.chunks.block_ids[first : first + len(chunk.block_ids)], chunk.block_ids)
    for table in (
        tables.decode.parts,
        tables.decode.block_ids,
        tables.chunks.chunks,
        tables.chunks.query_tiles,
    ):
        assert table.storage_offset() % 4 == 0


def test_batches_of_about_a_size_have_tables_of_one_size() -> None:
    def shapes(num_decode: int, num_keys: int, num_tokens: int) -> list[torch.Size]:
        table = torch.arange(300)
        chunk = make_chunk(num_decode, num_tokens, 0, num_keys, table, 16)
        rows = [DecodeRow(range(-(-num_keys // 16)), num_keys)] * num_decode
        shape = TableShape(group=4, tile_keys=64, num_programs=33)
        tables = AttentionTables.build(AttentionBatch(rows, [chunk]), CPU, shape)
        assert tables.decode is not None
        assert tables.chunks is not None
        return [
            tables.decode.rows.shape,
            tables.chunks.query_tiles.shape,
            tables.chunks.key_tiles.shape,
        ]

    assert shapes(9, 1030, 300) == shapes(16, 1500, 400)
