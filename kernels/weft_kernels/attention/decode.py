"""Decode rows grouped by length: every group is padded to its longest sequence and computed by one call.

Owns the grouping. One call for all rows would make everybody read as many keys as the longest sequence has;
one call per row would be a loop over sequences. Built once per iteration, shared by all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft_kernels.transfer import upload_indices

_CHEAP_PADDING_KEYS = 128
"""Padding of a bucket that costs less than one more call."""


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """Decode rows of similar length.

    Attributes:
        rows: `[S]` int64 rows of the flat batch, ascending; None where they are `[0, S)`.
        block_tables: `[S, max_blocks]` int64; unused entries repeat the sequence's own first block.
        lengths: `[S]` int64, the keys of each sequence, the current token included.
        num_keys: the largest of `lengths`: what every row is padded to.
        is_even: whether all lengths are the same.
    """

    rows: Tensor | None
    block_tables: Tensor
    lengths: Tensor
    num_keys: int
    is_even: bool
    _masks: dict[tuple[torch.dtype, int | None], Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )
    _slots: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_rows(self) -> int:
        """S, its number of sequences."""
        return self.lengths.shape[0]

    def slots(self, block_size: int) -> Tensor:
        """Cache rows of the padded call, `[S, num_keys]` int64, kept for other layers.

        Past a sequence's end they repeat its own first row: what a block held for somebody else is never
        read, not even to be masked (a NaN would survive the mask).
        """
        if block_size not in self._slots:
            keys = torch.arange(self.num_keys, device=self.lengths.device)
            slots = self.block_tables[:, keys // block_size] * block_size + keys % block_size
            if not self.is_even:
                slots = torch.where(keys < self.lengths.unsqueeze(1), slots, slots[:, :1])
            self._slots[block_size] = slots
        return self._slots[block_size]

    def mask(self, dtype: torch.dtype, sliding_window: int | None) -> Tensor | None:
        """Additive mask `[S, 1, 1, num_keys]`, kept for other layers; None where nothing is hidden."""
        if self.is_even and (sliding_window is None or sliding_window >= self.num_keys):
            return None
        key = (dtype, sliding_window)
        if key not in self._masks:
            keys = torch.arange(self.num_keys, device=self.lengths.device)
            lengths = self.lengths.unsqueeze(1)
            hidden = keys >= lengths
            if sliding_window is not None:
                hidden |= keys < lengths - sliding_window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=keys.device).masked_fill_(hidden, -torch.inf)
            self._masks[key] = mask.view(-1, 1, 1, self.num_keys)
        return self._masks[key]


def make_buckets(
    block_tables: Sequence[Sequence[int]], lengths: Sequence[int], device: torch.device, *, max_keys: int
) -> tuple[DecodeBucket, ...]:
    """Group the decode rows of a flat batch.

    Args:
        block_tables: the blocks of each row's sequence, which cover its length.
        lengths: keys of each row, the current token included; row `i` of the batch is entry `i`.
        max_keys: keys, padding included, that one call may gather (a longer sequence is alone in its call).
    """
    groups = group_by_length(lengths, max_keys=max_keys)
    return tuple(
        _bucket(
            None if len(groups) == 1 else group,
            [block_tables[row] for row in group],
            [lengths[row] for row in group],
            device,
        )
        for group in groups
    )


def group_by_length(lengths: Sequence[int], *, max_keys: int) -> list[list[int]]:
    """Indices of similar lengths, each group ascending.

    In a group no length is less than half of the longest, but for as much padding as a call of its own would
    cost; and the padded group has at most `max_keys` keys, if it has more than one member.
    """
    groups: list[list[int]] = []
    longest = cheap = 0
    for idx in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        padding = longest - lengths[idx]
        is_similar = 2 * lengths[idx] >= longest
        if groups and (is_similar or padding <= cheap) and (len(groups[-1]) + 1) * longest <= max_keys:
            groups[-1].append(idx)
            cheap -= 0 if is_similar else padding
        else:
            groups.append([idx])
            longest, cheap = lengths[idx], _CHEAP_PADDING_KEYS
    return [sorted(group) for group in groups]


def _bucket(
    rows: Sequence[int] | None,
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    device: torch.device,
) -> DecodeBucket:
    width = max(len(table) for table in tables)
    padded: list[int] = []
    for table in tables:
        padded += table
        padded += [table[0]] * (width - len(table))
    return DecodeBucket(
        rows=None if rows is None else upload_indices(rows, device),
        block_tables=upload_indices(padded, device).view(len(tables), width),
        lengths=upload_indices(lengths, device),
        num_keys=max(lengths),
        is_even=min(lengths) == max(lengths),
    )
