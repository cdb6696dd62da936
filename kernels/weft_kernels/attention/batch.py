"""Which rows of a flat batch attend to which cached tokens. Built once per iteration, shared by all
layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


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
    """Decode rows come first in the flat batch, one per sequence; the chunks follow in row order.

    `decode_block_tables` is `[S, max_blocks]` int64 (unused entries: any block), `decode_lengths` `[S]` int64
    the number of keys of each sequence, the current token included.
    """

    num_decode: int
    decode_block_tables: Tensor
    decode_lengths: Tensor
    chunks: Sequence[AttentionChunk]
    _masks: dict[tuple[torch.dtype, int | None], Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )
    _decode_slots: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def decode_slots(self, block_size: int) -> Tensor:
        """Cache rows of the padded decode call, `[S, max_blocks * block_size]` int64, kept for other layers.

        Past a sequence's end they repeat its own first row: what a block held for somebody else is never
        read, not even to be masked (a NaN would survive the mask).
        """
        if block_size not in self._decode_slots:
            tables = self.decode_block_tables
            offsets = torch.arange(block_size, device=tables.device)
            slots = (tables.unsqueeze(2) * block_size + offsets).flatten(1)
            keys = torch.arange(slots.shape[1], device=tables.device).unsqueeze(0)
            self._decode_slots[block_size] = torch.where(
                keys < self.decode_lengths.unsqueeze(1), slots, slots[:, :1]
            )
        return self._decode_slots[block_size]

    def decode_mask(self, num_keys: int, dtype: torch.dtype, sliding_window: int | None) -> Tensor:
        """Additive mask `[S, 1, 1, num_keys]` of the padded decode call, kept for the other layers."""
        key = (dtype, sliding_window)
        if key not in self._masks:
            keys = torch.arange(num_keys, device=self.decode_lengths.device).unsqueeze(0)
            lengths = self.decode_lengths.unsqueeze(1)
            hidden = keys >= lengths
            if sliding_window is not None:
                hidden |= keys < lengths - sliding_window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=keys.device).masked_fill_(hidden, -torch.inf)
            self._masks[key] = mask.view(-1, 1, 1, num_keys)
        return self._masks[key]
