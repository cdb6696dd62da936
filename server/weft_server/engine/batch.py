"""From a plan's segments to the tensors of one flat batch.

Row order: decode rows (sorted by adapter slot), then prompt chunks, then finetuning windows. So one adapter's
decode rows are neighbours, and all finetuning rows are contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft_kernels.attention import AttentionBatch, DecodeRow, make_chunk
from weft_kernels.lora import LoraBatch
from weft_kernels.transfer import upload_indices
from weft_scheduler.plan import Segment, SegmentKind
from weft_server.engine.sequence import Sequence as GeneratedSequence
from weft_server.model.batch import TokenBatch
from weft_server.training.backward import training_dropout
from weft_server.training.pack import Pack

_ORDER = {SegmentKind.DECODE: 0, SegmentKind.PREFILL: 1, SegmentKind.TRAIN: 2}


@dataclass(frozen=True, slots=True)
class PlacedSegment:
    """A segment and its first row in the flat batch."""

    segment: Segment
    row: int

    @property
    def rows(self) -> slice:
        """Its rows."""
        return slice(self.row, self.row + self.segment.num_tokens)


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """`token_ids` `[T]` int64; the first `num_decode` are placeholders that the runner fills from the
    device."""

    token_ids: Tensor
    tokens: TokenBatch
    segments: tuple[PlacedSegment, ...]
    num_decode: int

    def of_kind(self, kind: SegmentKind) -> list[PlacedSegment]:
        """Segments of one kind, in row order."""
        return [placed for placed in self.segments if placed.segment.kind is kind]


def build_batch(
    segments: Sequence[Segment],
    sequences: Mapping[str, GeneratedSequence],
    packs: Mapping[str, Pack],
    *,
    block_size: int,
    device: torch.device,
) -> FlatBatch:
    """Lay a plan's segments out as one flat batch on `device`."""
    placed = _place(segments)
    decode = [p for p in placed if p.segment.kind is SegmentKind.DECODE]
    others = placed[len(decode) :]
    token_ids: list[Tensor] = [torch.zeros(len(decode), dtype=torch.int64, device=device)]
    positions: list[Tensor] = [upload_indices([p.segment.start for p in decode], device)]
    slots: list[Tensor] = [
        upload_indices([_slot(p.segment, p.segment.start, block_size) for p in decode], device)
    ]
    chunks, spans = [], []
    for item in others:
        segment = item.segment
        first, end = segment.start, segment.start + segment.num_tokens
        table = upload_indices(segment.block_ids, device)
        tokens = torch.arange(first, end, device=device)
        slots.append(table[tokens // block_size] * block_size + tokens % block_size)
        if segment.kind is SegmentKind.TRAIN:
            pack = packs[segment.sequence_id]
            token_ids.append(pack.token_ids[first:end])
            positions.append(pack.positions[first:end])
            chunks += [c.chunk for c in pack.chunks(first, end, item.row, table, block_size)]
            spans.append((pack, first, end))
        else:
            token_ids.append(upload_indices(sequences[segment.sequence_id].tokens(first, end), device))
            positions.append(tokens)
            chunks.append(make_chunk(item.row, segment.num_tokens, 0, end, table, block_size))
    num_rows = placed[-1].rows.stop if placed else 0
    num_trained = sum(end - first for _, first, end in spans)
    runs = [(p.segment.adapter_slot, p.row, p.segment.num_tokens) for p in placed]
    return FlatBatch(
        token_ids=torch.cat(token_ids),
        tokens=TokenBatch(
            positions=torch.cat(positions),
            slot_mapping=torch.cat(slots),
            attention=AttentionBatch(
                [DecodeRow(p.segment.block_ids, p.segment.start + 1) for p in decode],
                chunks,
            ),
            lora=LoraBatch.build([(slot, row, n) for slot, row, n in runs if slot is not None], device),
            dropout=training_dropout(spans, num_rows - num_trained, num_rows, device),
        ),
        segments=tuple(placed),
        num_decode=len(decode),
    )


def _place(segments: Sequence[Segment]) -> list[PlacedSegment]:
    def order(segment: Segment) -> tuple[int, int]:
        return _ORDER[segment.kind], -1 if segment.adapter_slot is None else segment.adapter_slot

    placed, row = [], 0
    for segment in sorted(segments, key=order):
        placed.append(PlacedSegment(segment, row))
        row += segment.num_tokens
    return placed


def _slot(segment: Segment, position: int, block_size: int) -> int:
    return segment.block_ids[position // block_size] * block_size + position % block_size
