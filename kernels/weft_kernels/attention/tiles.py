"""Query rows of a batch cut into tiles, and tiles of one shape put into groups: the work of the reference.

A tile is some consecutive rows of one sequence and the keys that any of them sees: one decode row, or up to
128 rows of a chunk. Tiles whose padded shapes are the same form a group, which is computed by a few batched
matrix products whatever the number of sequences. Sizes are padded to steps, so that the library's matrix
products, which are generated per shape, meet few shapes.

Decode rows of similar length form a group, too, padded to its longest: one call for all of them would make
everybody read as many keys as the longest has, one call for each would be a loop over sequences.

Padding never reads what somebody else may have written: past a tile's keys, its own first key is repeated
(and masked), past its rows, its own last row. A NaN would survive a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft_kernels.attention.batch import AttentionBatch, AttentionChunk, DecodeRow
from weft_kernels.transfer import upload_indices

MAX_SCORES = 1 << 20
"""Scores of one group: about what a processor's caches hold."""
_MAX_ROWS, _MIN_ROWS = 128, 32
_MIN_GROUPED_ROWS = 16
"""Tiles of fewer rows count as if they had so many: their keys fill the caches, not their scores."""
_MAX_TILE_SCORES = 1 << 17
"""Scores of one head in one tile; longer keys get fewer rows."""
_KEY_STEP = 64
_CHEAP_PADDING_KEYS = 128
"""Padding of a group of decode rows that costs less than one more call."""


@dataclass(frozen=True, slots=True)
class KeySpan:
    """The keys of one tile: `num_keys` from key `first_key` of chunk `chunk_idx` on."""

    chunk_idx: int
    first_key: int
    num_keys: int


@dataclass(frozen=True, slots=True)
class TileGroup:
    """`num_tiles` tiles of `num_rows` rows and `num_keys` keys each, padding included.

    Attributes:
        rows: rows of the flat batch, tile by tile: `[num_tiles · num_rows]` int64, or a slice where they are
            consecutive and none is padding.
        real: which of `rows` are no padding, as indices into them, int64; None where all are.
        slots: cache rows (block id · block size + offset) of the keys, `[num_tiles, num_keys]` int64.
        hidden: which keys a row does not see, `[num_tiles, num_rows, num_keys]` bool; None where all rows see
            all keys.
        spans: the keys of each tile; empty for decode rows, which have no gradients.
    """

    num_tiles: int
    num_rows: int
    num_keys: int
    rows: slice | Tensor
    real: Tensor | None
    slots: Tensor
    hidden: Tensor | None
    spans: tuple[KeySpan, ...]
    _masks: dict[torch.dtype, Tensor] = field(default_factory=dict, compare=False, repr=False)
    _key_rows: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_decode(self) -> bool:
        """Whether its tiles are decode rows, a row each."""
        return not self.spans

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """`hidden` as an additive mask `[num_tiles, 1, num_rows, 1, num_keys]`."""
        if self.hidden is None:
            return None
        if dtype not in self._masks:
            zeros = torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device)
            mask = zeros.masked_fill_(self.hidden, -torch.inf)
            self._masks[dtype] = mask[:, None, :, None, :]
        return self._masks[dtype]

    def key_rows(self, num_kv_heads: int) -> Tensor:
        """Rows of a cache seen as `[num_slots · Hkv, D]`: `[num_tiles · Hkv · num_keys]`, head by head."""
        if num_kv_heads not in self._key_rows:
            heads = torch.arange(num_kv_heads, device=self.slots.device)[:, None]
            self._key_rows[num_kv_heads] = (self.slots[:, None] * num_kv_heads + heads).flatten()
        return self._key_rows[num_kv_heads]


def tile_groups(
    batch: AttentionBatch,
    block_size: int,
    sliding_window: int | None,
    device: torch.device,
    *,
    num_heads: int,
    max_decode_keys: int,
) -> tuple[TileGroup, ...]:
    """The groups that make up a batch, for all layers that have this window.

    Args:
        num_heads: query heads; with them, a group of chunks' tiles has at most `MAX_SCORES` scores.
        max_decode_keys: keys, padding included, that a group of decode rows may gather (a longer sequence is
            alone in its group).
    """
    return (
        *_decode_groups(batch.decode, block_size, max_decode_keys, sliding_window, device),
        *_chunk_groups(batch.chunks, block_size, MAX_SCORES // num_heads, sliding_window, device),
    )


# ---------------------------------------------------------------- decode rows


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


def _decode_groups(
    decode: Sequence[DecodeRow],
    block_size: int,
    max_keys: int,
    sliding_window: int | None,
    device: torch.device,
) -> list[TileGroup]:
    groups = group_by_length([row.num_keys for row in decode], max_keys=max_keys)
    return [
        _decode_group(group, [decode[row] for row in group], block_size, sliding_window, device)
        for group in groups
    ]


def _decode_group(
    idx: list[int],
    decode: list[DecodeRow],
    block_size: int,
    sliding_window: int | None,
    device: torch.device,
) -> TileGroup:
    lengths = upload_indices([row.num_keys for row in decode], device).unsqueeze(1)
    num_keys = max(row.num_keys for row in decode)
    keys = torch.arange(num_keys, device=device)
    tables = _block_tables([row.block_ids for row in decode], -(-num_keys // block_size), device)
    slots = tables[:, keys // block_size] * block_size + keys % block_size
    hidden = keys >= lengths
    slots = torch.where(hidden, slots[:, :1], slots)
    if sliding_window is not None:
        hidden |= keys < lengths - sliding_window
    is_even = num_keys == min(row.num_keys for row in decode)
    sees_all = is_even and (sliding_window is None or sliding_window >= num_keys)
    return TileGroup(
        num_tiles=len(decode),
        num_rows=1,
        num_keys=num_keys,
        rows=_rows(idx, device),
        real=None,
        slots=slots,
        hidden=None if sees_all else hidden[:, None, :],
        spans=(),
    )


def _block_tables(tables: Sequence[Sequence[int]], width: int, device: torch.device) -> Tensor:
    values: list[int] = []
    for table in tables:
        values += table[:width]
        values += [table[0]] * (width - len(table))
    return upload_indices(values, device).view(len(tables), width)


# ---------------------------------------------------------------- chunks


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows `[first, first + num_rows)` of a chunk, its keys, and the key index of its first row among
    them."""

    first_row: int
    num_rows: int
    span: KeySpan
    position: int


def _chunk_groups(
    chunks: Sequence[AttentionChunk],
    block_size: int,
    max_scores: int,
    sliding_window: int | None,
    device: torch.device,
) -> list[TileGroup]:
    groups: dict[tuple[int, int], list[list[_Tile]]] = {}
    for chunk_idx, chunk in enumerate(chunks):
        for tile in _tiles(chunk_idx, chunk, sliding_window):
            shape = (_padded_rows(tile.num_rows), _padded(tile.span.num_keys))
            alike = groups.setdefault(shape, [])
            size = max(shape[0], _MIN_GROUPED_ROWS) * shape[1]
            if alike and (len(alike[-1]) + 1) * size <= max_scores:
                alike[-1].append(tile)
            else:
                alike.append([tile])
    slots = [_slots(chunk, block_size) for chunk in chunks]
    return [
        _chunk_group(tiles, *shape, slots, sliding_window, device)
        for shape, alike in groups.items()
        for tiles in alike
    ]


def _tiles(chunk_idx: int, chunk: AttentionChunk, sliding_window: int | None) -> list[_Tile]:
    earlier = chunk.num_keys - chunk.num_tokens
    longest = chunk.num_keys if sliding_window is None else min(chunk.num_keys, sliding_window)
    step = max(_MIN_ROWS, min(_MAX_ROWS, _MAX_TILE_SCORES // longest // _MIN_ROWS * _MIN_ROWS))
    tiles = []
    for first in range(0, chunk.num_tokens, step):
        num_rows = min(step, chunk.num_tokens - first)
        first_key = 0 if sliding_window is None else max(0, earlier + first + 1 - sliding_window)
        span = KeySpan(chunk_idx, first_key, earlier + first + num_rows - first_key)
        tiles.append(_Tile(chunk.row_start + first, num_rows, span, earlier + first - first_key))
    return tiles


def _chunk_group(
    tiles: list[_Tile],
    num_rows: int,
    num_keys: int,
    slots: list[Tensor],
    sliding_window: int | None,
    device: torch.device,
) -> TileGroup:
    rows = torch.arange(num_rows, device=device)
    own = upload_indices([value for t in tiles for value in (t.first_row, t.num_rows, t.position)], device)
    first_rows, counts, positions = own.view(-1, 3, 1).unbind(1)
    rows = torch.minimum(rows, counts - 1)  # [tiles, rows]
    positions = (positions + rows).unsqueeze(2)
    is_padded = any(t.num_rows < num_rows for t in tiles)
    keys = torch.arange(num_keys, device=device)
    hidden = keys > positions
    if sliding_window is not None:
        hidden |= keys <= positions - sliding_window
    flat = [row for t in tiles for row in range(t.first_row, t.first_row + t.num_rows)]
    return TileGroup(
        num_tiles=len(tiles),
        num_rows=num_rows,
        num_keys=num_keys,
        rows=(first_rows + rows).flatten() if is_padded else _rows(flat, device),
        real=(torch.arange(num_rows, device=device) < counts).flatten().nonzero().squeeze(1)
        if is_padded
        else None,
        slots=torch.stack([_padded_slots(slots[t.span.chunk_idx], t.span, num_keys) for t in tiles]),
        hidden=hidden,
        spans=tuple(t.span for t in tiles),
    )


def _slots(chunk: AttentionChunk, block_size: int) -> Tensor:
    keys = torch.arange(chunk.key_offset, chunk.key_offset + chunk.num_keys, device=chunk.block_ids.device)
    return chunk.block_ids[keys // block_size] * block_size + keys % block_size


def _padded_slots(slots: Tensor, span: KeySpan, num_keys: int) -> Tensor:
    own = slots[span.first_key : span.first_key + span.num_keys]
    return torch.cat((own, own[:1].expand(num_keys - span.num_keys)))


def _rows(rows: list[int], device: torch.device) -> slice | Tensor:
    if rows[-1] - rows[0] + 1 == len(rows) and rows == sorted(rows):
        return slice(rows[0], rows[-1] + 1)
    return upload_indices(rows, device)


def _padded(num_keys: int) -> int:
    return -(-num_keys // _KEY_STEP) * _KEY_STEP


def _padded_rows(num_rows: int) -> int:
    """1, 2, 4, 8, 16, or a multiple of 32."""
    return (
        1 << (num_rows - 1).bit_length() if num_rows <= _MIN_ROWS else -(-num_rows // _MIN_ROWS) * _MIN_ROWS
    )
