"""Which rows of a flat batch attend to which cached tokens. Built once per iteration, shared by all
layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T")


class DecodeRow(NamedTuple):
    """One row, the newest token of its sequence: it sees the sequence's `num_keys` tokens, its own included,
    which lie in the blocks `block_ids`."""

    block_ids: Sequence[int]
    num_keys: int


class AttentionChunk(NamedTuple):
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
    """Decode rows come first in the flat batch, row `i` is `decode[i]`; the chunks follow in row order, then
    `num_padding` rows that see nothing and whose output is undefined."""

    decode: Sequence[DecodeRow]
    chunks: Sequence[AttentionChunk]
    num_padding: int = 0
    _kept: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_rows(self) -> int:
        """T, the rows of the flat batch."""
        return len(self.decode) + sum(chunk.num_tokens for chunk in self.chunks) + self.num_padding

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned when it was first called for this key: whatever an implementation derives from
        the batch is derived for one layer and kept for the others."""
        if key not in self._kept:
            self._kept[key] = make()
        value: T = self._kept[key]
        return value
