"""The plan of one iteration: a frozen value that says what runs, on which KV blocks and adapter slots.

The scheduler makes plans, the engine obeys them. A plan carries no token values: those stay on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class SegmentKind(Enum):
    """What a run of tokens of one sequence is computed for."""

    DECODE = "decode"
    PREFILL = "prefill"
    TRAIN = "train"


class Segment(NamedTuple):
    """Consecutive tokens of one sequence (or finetuning pack) in the flat forward batch.

    Tokens `[start, start + num_tokens)` are computed; keys and values of `[0, start)` are already cached in
    `block_ids`, which covers `[0, start + num_tokens)`. `samples` says that the last token's logits are
    sampled. For TRAIN segments `sequence_id` is the pack id; `with_loss` is False when a dropped pack is
    forwarded again, and `keeps_activations` says that the backward will read what the layers compute (else
    it computes that once more).
    """

    sequence_id: str
    kind: SegmentKind
    start: int
    num_tokens: int
    adapter_slot: int | None
    block_ids: tuple[int, ...]
    samples: bool = False
    with_loss: bool = False
    keeps_activations: bool = False


class BackwardSlice(NamedTuple):
    """One (layer, window) of a backward wave: every pack of the wave that has such a window takes part.

    Windows are numbered from the start of a pack, `window_tokens` each (the last may be shorter); a wave
    visits layers from last to first and, within a layer, windows from last to first.
    """

    wave_id: int
    pack_ids: tuple[str, ...]
    layer: int
    window: int


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """Copy an adapter from host memory into `[offset, offset + num_elements)` of the arena and enter it at
    `slot`.
    """

    adapter: str
    slot: int
    offset: int
    num_elements: int


@dataclass(frozen=True, slots=True)
class AdapterMove:
    """Copy the adapter at `slot` from `[source, source + num_elements)` of the arena to the same length at
    `destination`, which may overlap it, and point the slot there. No plan in flight reads the adapter.
    """

    adapter: str
    slot: int
    source: int
    destination: int
    num_elements: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What changes hands before the iteration runs, in this order: evictions, moves one after the other,
    loads, fetches. Fetches and loads start now and end whenever they end.
    """

    adapter_fetches: tuple[str, ...] = ()
    adapter_loads: tuple[AdapterLoad, ...] = ()
    adapter_moves: tuple[AdapterMove, ...] = ()
    adapter_evictions: tuple[tuple[str, int], ...] = ()
    preempted: tuple[str, ...] = ()
    dropped_packs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything that one iteration does.

    `optimizer_steps` are jobs whose step is complete: their update runs after `backward`. `predicted_s` is
    the cost model's time for the iteration, `budget_s` the latency budget that it was filled up to. `expired`
    are requests that reached their deadline, each told once, also by a plan that `is_empty`; they are
    forgotten.
    """

    iteration: int
    forward: tuple[Segment, ...]
    backward: tuple[BackwardSlice, ...] = ()
    optimizer_steps: tuple[str, ...] = ()
    memory: MemoryPlan = MemoryPlan()
    predicted_s: float = 0.0
    budget_s: float = 0.0
    expired: tuple[str, ...] = ()

    @property
    def num_forward_tokens(self) -> int:
        """Tokens in the flat forward batch."""
        return sum(segment.num_tokens for segment in self.forward)

    @property
    def is_empty(self) -> bool:
        """True when there is nothing to compute (memory actions alone may remain)."""
        return not (self.forward or self.backward or self.optimizer_steps)
