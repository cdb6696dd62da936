"""The fixed device memory that captured layers read and write: hidden states and what describes a batch.

`RowBuffers` are rows of the largest batch; a `Bucket` is the first of them and tables for batches of up to
its number of rows. Knows nothing of graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weft_kernels.attention import AttentionBuffer, AttentionRoom, TableShape
from weft_kernels.lora import LoraBatch, LoraBuffer, LoraDropout
from weft_kernels.rope import Rotation
from weft_server.engine.graph_shapes import GraphVariant
from weft_server.model.batch import TokenBatch
from weft_server.model.decoder import Decoder

_NO_SLOT = -1
_SMALL_BATCH_ROWS, _SMALL_TILE_ROWS, _LARGE_TILE_ROWS = 256, 16, 64
"""Rows of a LoRA tile: batches that may be decode rows alone have an adapter for every few rows."""
_MIN_CHUNKS, _ROWS_PER_CHUNK = 16, 8
"""Room for chunks (examples of a window, mostly) of eight rows on average; shorter ones find room in larger
buckets."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """The largest batch: its rows, its sequences, and the blocks in the tables of either kind of rows."""

    max_rows: int
    max_num_seqs: int
    max_blocks: int


class RowBuffers:
    """What has a row per token, for `max_rows` tokens.

    Attributes:
        hidden: `[N, hidden]`, the layers' input and output. slot_mapping: `[N]` int64, -1 for padding.
        rotation: `[N, 1, D]` each. dropout: `[N]` each. positions: `[N]` int64, not read by any layer.
    """

    def __init__(self, decoder: Decoder, max_rows: int) -> None:
        config, device = decoder.config, decoder.device
        self.hidden = torch.zeros(max_rows, config.hidden_size, dtype=decoder.dtype, device=device)
        self.slot_mapping = torch.full((max_rows,), _NO_SLOT, dtype=torch.int64, device=device)
        self.positions = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.rotation = Rotation(
            *(torch.zeros(max_rows, 1, config.head_dim, dtype=decoder.dtype, device=device) for _ in range(2))
        )
        self.dropout = LoraDropout(
            torch.zeros(max_rows, device=device), torch.zeros(max_rows, dtype=torch.int64, device=device)
        )


class Bucket:
    """The fixed batch of `num_rows` rows: the buffers that launches captured for it read."""

    def __init__(
        self,
        num_rows: int,
        rows: RowBuffers,
        limits: BatchLimits,
        tables: TableShape,
        num_adapter_slots: int,
    ) -> None:
        self.num_rows = num_rows
        self.hidden = rows.hidden[:num_rows]
        self.rotation = Rotation(rows.rotation.cos[:num_rows], rows.rotation.sin[:num_rows])
        self._positions = rows.positions[:num_rows]
        self._slot_mapping = rows.slot_mapping[:num_rows]
        self._dropout = rows.dropout.select(slice(num_rows))
        device = rows.hidden.device
        room = AttentionRoom(
            num_rows=num_rows,
            max_decode=min(num_rows, limits.max_num_seqs),
            max_chunks=min(num_rows, max(_MIN_CHUNKS, num_rows // _ROWS_PER_CHUNK)),
            max_blocks=limits.max_blocks,
        )
        self._attention = AttentionBuffer(room, tables, device)
        tile_rows = _SMALL_TILE_ROWS if num_rows <= _SMALL_BATCH_ROWS else _LARGE_TILE_ROWS
        max_tiles = min(num_rows, num_rows // tile_rows + num_adapter_slots)
        self._lora = LoraBuffer(num_rows, max_tiles, tile_rows, device)

    def holds(self, batch: TokenBatch) -> bool:
        """Whether there is room for it."""
        fits = self._attention.holds(batch.attention)
        return fits and (batch.lora is None or batch.lora.fits(self._lora))

    def fill(
        self, hidden: torch.Tensor, batch: TokenBatch, rotation: Rotation, variant: GraphVariant
    ) -> None:
        """Replace what a variant reads by a batch and its hidden states `[T, hidden]`, by copies on the
        current stream. What the rows behind them hold is never read, but for their slots: none.

        Raises:
            ValueError: a batch that the bucket does not hold.
        """
        num_rows = len(hidden)
        self.hidden[:num_rows].copy_(hidden)
        self._slot_mapping[:num_rows].copy_(batch.slot_mapping)
        self._slot_mapping[num_rows:].fill_(_NO_SLOT)
        for fixed, given in zip(self.rotation, rotation, strict=True):
            fixed[:num_rows].copy_(given)
        self._attention.fill(batch.attention)
        if variant.max_rank:
            self._fill_adapters(batch)
        if variant.has_dropout:
            self._fill_dropout(batch, num_rows)

    def _fill_adapters(self, batch: TokenBatch) -> None:
        if batch.lora is None:
            self._lora.fill((), (), ())
        else:
            batch.lora.copy_to(self._lora)

    def _fill_dropout(self, batch: TokenBatch, num_rows: int) -> None:
        if batch.dropout is None or not batch.dropout.active:
            self._dropout.p.zero_()
        else:
            self._dropout.p[:num_rows].copy_(batch.dropout.p)
            self._dropout.keys[:num_rows].copy_(batch.dropout.keys)

    def token_batch(self, variant: GraphVariant) -> TokenBatch:
        """The batch to capture: whatever the bucket holds when the launches run. Changes what it holds."""
        lora = None
        if variant.max_rank:
            device = self.hidden.device
            # Its one row is overwritten by the first batch.
            lora = LoraBatch.build([(0, 0, 1)], device, self._lora, variant.max_rank)
        return TokenBatch(
            positions=self._positions,
            slot_mapping=self._slot_mapping,
            attention=self._attention.batch(has_chunks=variant.has_chunks),
            lora=lora,
            dropout=self._dropout if variant.has_dropout else None,
        )
