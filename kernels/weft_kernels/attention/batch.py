"""Which rows of a flat batch attend to which cached tokens. Built once per iteration, shared by all
layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft_kernels.attention.decode import DecodeBucket


@dataclass(frozen=True, slots=True)
class AttentionChunk:
    """Consecutive rows of one sequence and the keys that they may see.

    Row `i` of the chunk is at key index `num_keys - num_tokens + i` (causal, bottom-right aligned).
    `block_ids` `[num_blocks]` int64 are the blocks that hold the keys; the first key is `key_offset` tokens
    into the first block.
    """

    row_start: int
    num_tokens: int
    num_keys: int
    key_offset: int
    block_ids: Tensor
    _masks: dict[tuple[torch.dtype, int | None], Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )

    def mask(self, dtype: torch.dtype, device: torch.device, sliding_window: int | None) -> Tensor:
        """Additive causal mask `[num_tokens, num_keys]`, kept for the other layers of the iteration."""
        key = (dtype, sliding_window)
        if key not in self._masks:
            positions = torch.arange(self.num_keys - self.num_tokens, self.num_keys, device=device).unsqueeze(
                1
            )
            keys = torch.arange(self.num_keys, device=device).unsqueeze(0)
            hidden = keys > positions
            if sliding_window is not None:
                hidden |= keys <= positions - sliding_window
            self._masks[key] = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(
                hidden, -torch.inf
            )
        return self._masks[key]


def make_chunk(
    row_start: int, num_tokens: int, first_key: int, end_key: int, block_table: Tensor, block_size: int
) -> AttentionChunk:
    """A chunk whose keys are tokens `[first_key, end_key)` of a sequence with this `[num_blocks]` block
    table."""
    first_block = first_key // block_size
    end_block = -(-end_key // block_size)
    return AttentionChunk(
        row_start=row_start,
        num_tokens=num_tokens,
        num_keys=end_key - first_key,
        key_offset=first_key - first_block * block_size,
        block_ids=block_table[first_block:end_block],
    )


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Decode rows come first in the flat batch, one per sequence, each in one of the buckets; the chunks
    follow in row order."""

    decode: Sequence[DecodeBucket]
    chunks: Sequence[AttentionChunk]

    @property
    def num_decode(self) -> int:
        """Number of decode rows."""
        return sum(bucket.num_rows for bucket in self.decode)
