"""Wide copies of rows: every row once and in order, whatever fits the buffer; nothing is copied in vain."""

from unittest import mock

import pytest
import torch

from weft_kernels.lora import widening
from weft_kernels.lora.widening import Widener


@pytest.mark.parametrize("max_bytes", [1, 4 * 70, 3 * 4 * 70, 1 << 20])
def test_chunks_are_the_rows_in_the_wider_dtype(max_bytes: int) -> None:
    wide = torch.randn(10, 140, generator=torch.Generator().manual_seed(0)).bfloat16()
    matrix, widener, seen = wide[:, 40:110], Widener(), []
    with mock.patch.object(widening, "_MAX_BYTES", max_bytes):
        for _ in range(2):
            seen.clear()
            for rows, chunk in widener.chunks(matrix, torch.float32):
                assert torch.equal(chunk, matrix[rows].float())
                seen += range(10)[rows]
            assert seen == list(range(10))


def test_a_matrix_of_the_wanted_dtype_is_itself() -> None:
    matrix = torch.randn(3, 5)
    [(rows, chunk)] = Widener().chunks(matrix, torch.float32)
    assert chunk is matrix
    assert rows == slice(0, 3)


def test_a_larger_matrix_after_a_smaller_one_is_whole() -> None:
    widener = Widener()
    for num_rows in (2, 50, 3):
        matrix = torch.arange(num_rows * 4, dtype=torch.float32).view(num_rows, 4).bfloat16()
        found = torch.cat([chunk.clone() for _, chunk in widener.chunks(matrix, torch.float64)])
        assert torch.equal(found, matrix.double())
