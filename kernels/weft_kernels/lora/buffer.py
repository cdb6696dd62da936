"""Device memory of fixed place and size for the tables of a LoRA batch.

A CUDA graph repeats launches with the addresses, grids and tile sizes that it was captured with. Captured
over a batch that is built on a `LoraBuffer`, it serves every later batch that is copied to the same buffer:
tiles past the end have no rows, and their programs end at once. Tile rows and the largest rank that there may
be are part of what was captured; who keeps graphs keeps one for each of those.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from weft_kernels.transfer import upload_indices

_ENTRY = 3


class LoraBuffer:
    """Room for `max_rows` rows in `max_tiles` tiles of `tile_rows` rows (16, 32 or 64), of as many adapters.

    Attributes:
        token_idx: int64 [max_rows]. tiles, segments: int64 [max_tiles, 3] of `(slot, start, num_rows)`.

    Raises:
        ValueError: a size below 1, or a number of tile rows that there is no kernel for.
    """

    def __init__(
        self, max_rows: int, max_tiles: int, tile_rows: int, device: torch.device | str = "cuda"
    ) -> None:
        if min(max_rows, max_tiles) < 1 or tile_rows not in (16, 32, 64):
            raise ValueError(f"no kernel for {max_rows} rows in {max_tiles} tiles of {tile_rows}")
        self.tile_rows = tile_rows
        self._device = torch.device(device)
        # Each part begins at a multiple of 16 bytes.
        self._tiles_at = -(-max_rows // 2) * 2
        self._segments_at = self._tiles_at + -(-max_tiles * _ENTRY // 2) * 2
        size = self._segments_at + max_tiles * _ENTRY
        self._values = torch.zeros(size, dtype=torch.int64, device=self._device)
        self.token_idx: Tensor = self._values[:max_rows]
        self.tiles = self._values[self._tiles_at :][: max_tiles * _ENTRY].view(-1, _ENTRY)
        self.segments = self._values[self._segments_at :].view(-1, _ENTRY)

    def fill(self, token_idx: Sequence[int], tiles: Sequence[int], segments: Sequence[int]) -> None:
        """Replace what is there, by one copy on the current stream: after all launches that read it before.

        Raises:
            ValueError: more rows, tiles or segments than there is room for.
        """
        for name, values, room in (
            ("rows", token_idx, self.token_idx.numel()),
            ("tile values", tiles, self.tiles.numel()),
            ("segment values", segments, self.segments.numel()),
        ):
            if len(values) > room:
                raise ValueError(f"{len(values)} {name} do not fit the buffer's {room}")
        row = [*token_idx, *[0] * (self._tiles_at - len(token_idx)), *tiles]
        row += [0] * (self._segments_at - len(row))
        row += segments
        row += [0] * (self._values.numel() - len(row))
        self._values.copy_(upload_indices(row, self._device), non_blocking=True)
