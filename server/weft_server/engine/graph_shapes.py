"""Which graphs there are: how many rows a batch is padded to, and what is computed of it. Pure values."""

from __future__ import annotations

from dataclasses import dataclass

MAX_STEP = 128
"""Rows between neighbouring buckets at most: about the rows of a tile of the library's GEMM, so that padding
adds hardly a tile."""
_LAST_POWER = 64
_STEPS_PER_OCTAVE = 4
MAX_RANKS = (16, 64, 256)
"""Largest ranks that launches of LoRA kernels are sized for."""


@dataclass(frozen=True, slots=True)
class GraphVariant:
    """What a graph computes beside the base's rows: chunks (prompts, finetuning) or decode rows alone,
    adapters of ranks up to `max_rank` (0: none), and dropout on their inputs or not."""

    has_chunks: bool
    max_rank: int
    has_dropout: bool = False

    def covers(self, needed: GraphVariant) -> bool:
        """Whether it computes all that is needed."""
        return (
            self.has_chunks >= needed.has_chunks
            and self.max_rank >= needed.max_rank
            and self.has_dropout >= needed.has_dropout
        )


VARIANTS = (
    GraphVariant(has_chunks=True, max_rank=0),
    GraphVariant(has_chunks=True, max_rank=16),
    GraphVariant(has_chunks=False, max_rank=0),
    GraphVariant(has_chunks=False, max_rank=16),
    GraphVariant(has_chunks=True, max_rank=64),
    GraphVariant(has_chunks=False, max_rank=64),
    GraphVariant(has_chunks=True, max_rank=64, has_dropout=True),
    GraphVariant(has_chunks=True, max_rank=256),
    GraphVariant(has_chunks=False, max_rank=256),
    GraphVariant(has_chunks=True, max_rank=256, has_dropout=True),
)
"""Those that are captured, the ones that are missed most first."""


@dataclass(frozen=True, slots=True)
class GraphKey:
    """One graph of every layer: for batches of up to `num_rows` rows that need no more than `variant`."""

    num_rows: int
    variant: GraphVariant


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Ascending numbers of rows that batches are padded to, the last `max_rows`: powers of two up to 64, then
    four an octave, but never more than 128 apart."""
    buckets, rows = [], 1
    while rows < max_rows:
        buckets.append(rows)
        octave = 1 << (rows.bit_length() - 1)
        rows += rows if rows < _LAST_POWER else min(octave // _STEPS_PER_OCTAVE, MAX_STEP)
    return (*buckets, max_rows)


def graph_keys(buckets: tuple[int, ...], max_num_seqs: int) -> tuple[GraphKey, ...]:
    """All graphs, in the order of their capture: the likeliest variants first, so that they are there if
    capturing must stop early; in each the largest first, whose scratch memory then serves the others.

    Decode rows alone are no more than `max_num_seqs`.
    """
    most_decode = next(bucket for bucket in buckets if bucket >= min(max_num_seqs, buckets[-1]))
    return tuple(
        GraphKey(bucket, variant)
        for variant in VARIANTS
        for bucket in reversed(buckets)
        if variant.has_chunks or bucket <= most_decode
    )
