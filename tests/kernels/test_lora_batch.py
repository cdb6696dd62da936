"""Sorting rows by adapter: every row once, tiles of one adapter each, and contiguous runs recognised."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft_kernels.lora import LoraBatch, LoraBuffer, LoraTable


@st.composite
def disjoint_runs(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    runs, row = [], 0
    for _ in range(draw(st.integers(1, 8))):
        row += draw(st.integers(0, 3))
        length = draw(st.integers(0, 70))
        runs.append((draw(st.integers(0, 3)), row, length))
        row += length
    return draw(st.permutations(runs))


@given(disjoint_runs())
def test_every_row_of_a_slot_appears_once_in_the_order_of_its_runs(runs: list[tuple[int, int, int]]) -> None:
    batch = LoraBatch.build(runs, "cpu")
    expected = {slot: [] for slot, _, _ in runs}
    for slot, start, length in runs:
        expected[slot] += range(start, start + length)
    expected = {slot: rows for slot, rows in expected.items() if rows}
    if not expected:
        assert batch is None
        return
    assert batch is not None
    found = {slot: batch.token_idx[start:end].tolist() for slot, start, end in batch.segments}
    assert found == expected
    assert list(found) == sorted(found)
    every_row = torch.arange(batch.max_row + 1)
    for (slot, _, _), rows in zip(batch.segments, batch.rows, strict=True):
        assert every_row[rows].tolist() == expected[slot]


@given(disjoint_runs())
def test_tiles_partition_the_segments(runs: list[tuple[int, int, int]]) -> None:
    batch = LoraBatch.build(runs, "cpu")
    if batch is None:
        return
    tiles, segments = batch.tables
    assert [(slot, start, end - start) for slot, start, end in batch.segments] == [
        tuple(row) for row in segments.tolist()
    ]
    covered = {slot: [] for slot, _, _ in batch.segments}
    for slot, start, length in tiles.tolist():
        assert 0 < length <= batch.tile_rows
        covered[slot] += range(start, start + length)
    assert covered == {slot: list(range(start, end)) for slot, start, end in batch.segments}


@given(disjoint_runs(), disjoint_runs())
def test_a_batch_copied_to_a_buffer_is_what_had_been_built_over_it(
    first: list[tuple[int, int, int]], second: list[tuple[int, int, int]]
) -> None:
    batches = [LoraBatch.build(runs, "cpu") for runs in (first, second)]
    if None in batches:
        return
    copied, built = (LoraBuffer(600, 60, 16, "cpu") for _ in range(2))
    for runs, batch in zip((first, second), batches, strict=True):
        assert batch is not None
        assert batch.fits(copied)
        batch.copy_to(copied)
        LoraBatch.build(runs, "cpu", built)
        for name in ("token_idx", "tiles", "segments"):
            assert torch.equal(getattr(copied, name), getattr(built, name))


def test_a_batch_fits_a_buffer_with_rows_and_tiles_for_it() -> None:
    batch = LoraBatch.build([(0, 0, 17), (1, 20, 1)], "cpu")
    assert batch is not None
    assert batch.fits(LoraBuffer(18, 3, 16, "cpu"))
    assert batch.fits(LoraBuffer(18, 2, 32, "cpu"))
    assert not batch.fits(LoraBuffer(17, 3, 16, "cpu"))
    assert not batch.fits(LoraBuffer(18, 2, 16, "cpu"))


def test_launches_may_be_sized_for_a_larger_rank() -> None:
    table = LoraTable(torch.zeros(64), 2, 1, 1)
    buffer = LoraBuffer(8, 2, 16, "cpu")
    for max_rank, expected in ((None, 0), (64, 64)):
        batch = LoraBatch.build([(0, 0, 1)], "cpu", buffer, max_rank)
        assert batch is not None
        assert batch.max_rank(table) == expected


def test_a_contiguous_slot_is_a_slice() -> None:
    batch = LoraBatch.build([(1, 4, 2), (1, 6, 3), (0, 0, 1), (0, 2, 1)], "cpu")
    assert batch is not None
    assert isinstance(batch.rows[0], torch.Tensor)
    assert batch.rows[1] == slice(4, 9)


def test_a_batch_without_rows_is_none() -> None:
    assert LoraBatch.build([], "cpu") is None
    assert LoraBatch.build([(0, 3, 0)], "cpu") is None


def test_a_row_in_two_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="row 4 belongs to two runs"):
        LoraBatch.build([(0, 0, 5), (1, 4, 2)], "cpu")


@pytest.mark.parametrize("run", [(-1, 0, 1), (0, -1, 1), (0, 0, -1)])
def test_negative_values_are_refused(run: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="negative"):
        LoraBatch.build([run], "cpu")


def test_addresses_of_gradients_follow_the_gradients() -> None:
    batch = LoraBatch.build([(0, 0, 1), (1, 1, 1)], "cpu")
    assert batch is not None
    first, second = torch.zeros(4), torch.zeros(4)
    assert batch.grad_pointers({1: first}).tolist() == [0, first.data_ptr()]
    assert batch.grad_pointers({1: second}).tolist() == [0, second.data_ptr()]


@given(disjoint_runs())
def test_all_that_kernels_read_begins_on_a_16_byte_boundary(runs: list[tuple[int, int, int]]) -> None:
    """Else Triton would compile the kernels anew for some numbers of rows and tiles."""
    batch = LoraBatch.build(runs, "meta")
    if batch is None:
        return
    for tensor in (batch.token_idx, *batch.tables):
        assert tensor.storage_offset() * tensor.itemsize % 16 == 0
    on_cpu = LoraBatch.build(runs, "cpu")
    assert on_cpu is not None
    assert [table.shape for table in batch.tables] == [table.shape for table in on_cpu.tables]
