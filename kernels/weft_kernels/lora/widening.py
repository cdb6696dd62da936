"""Rows in the dtype of gradients, for products that must be summed in it.

Owns one buffer that is used again and again: on a CPU, fresh memory of megabytes costs more than the copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_MAX_BYTES = 8 << 20


class Widener:
    """Makes wide copies of matrices, chunk by chunk. Not safe for concurrent use from several threads."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def chunks(self, matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """`(rows, matrix[rows] in dtype)` of all rows of `matrix` [T, C]: the matrix itself where it has the
        dtype, else copies of a few megabytes, each valid until the next is asked for."""
        num_rows, num_columns = matrix.shape
        if matrix.dtype == dtype:
            yield slice(0, num_rows), matrix
            return
        chunk = min(num_rows, max(1, _MAX_BYTES // (num_columns * dtype.itemsize)))
        num_bytes = chunk * num_columns * dtype.itemsize
        if self._buffer.numel() < num_bytes or self._buffer.device != matrix.device:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=matrix.device)
        wide = self._buffer[:num_bytes].view(dtype).view(chunk, num_columns)
        for start in range(0, num_rows, chunk):
            rows = slice(start, min(start + chunk, num_rows))
            yield rows, wide[: rows.stop - start].copy_(matrix[rows])
