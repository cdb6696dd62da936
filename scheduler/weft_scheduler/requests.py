"""Generation requests: what is asked for, how far each sequence is, and who waits.

A sequence's state runs ahead of the device: it advances when a plan is made (`num_computed`, `num_planned`),
and what is known for certain follows when the plan is committed (`num_generated`). Owns no blocks, slots or
clocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from weft_scheduler.prefix import PrefixChain, PrefixSpec


class RequestTooLarge(ValueError):
    """A request, pack or adapter that can never run here; the message gives the value and the limit."""


class ServiceTier(Enum):
    """Request classes: flex waits behind its tenant's default requests, and gives way first."""

    DEFAULT = "default"
    FLEX = "flex"


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One choice to generate. `num_prompt_tokens` includes text generated before a resubmission.

    At most `max_new_tokens` tokens are generated; a token of `stop_token_ids` ends the sequence once
    `min_new_tokens` tokens (it included) have been generated. `adapter` is a digest, None is the base model;
    `adapter_elements` is 0 if its size is not known before it is fetched. Within a tenant, default goes
    before flex, then lower `priority` first. Without `prefix` the request neither reads the prefix cache nor
    adds to it. At `deadline_s`, on the clock of `now`, the request is dropped wherever it is.
    """

    sequence_id: str
    tenant: str
    num_prompt_tokens: int
    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    adapter: str | None = None
    adapter_elements: int = 0
    priority: int = 0
    prefix: PrefixSpec | None = None
    tier: ServiceTier = ServiceTier.DEFAULT
    deadline_s: float | None = None


class SequenceStatus(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one request.

    `num_computed` tokens have keys and values (counting plans in flight), `num_planned` tokens have been
    sampled by plans made, `num_generated` by plans committed. `last_planned` is the last iteration that it
    took part in. `arrived_s` is when it was asked for, `waiting_since_s` when it last began to wait. `order`
    is unique and grows with arrival. Everything below `prefill_target` is computed as prompt. `has_aged` says
    that a flex sequence was admitted because it was overdue; `prompt_price_s` is what its prompt would take
    alone, from where it waits.

    `chain` names the blocks of the tokens known so far; the first `num_named` of its blocks have been entered
    in the prefix cache, or found there. `awaited` is the contents that it waits for another sequence to
    compute. `num_cached_tokens` of its prompt were found when it was first admitted.
    """

    spec: RequestSpec
    order: int
    max_new_tokens: int
    waiting_since_s: float
    arrived_s: float
    status: SequenceStatus = SequenceStatus.WAITING
    has_aged: bool = False
    prompt_price_s: float = 0.0
    num_generated: int = 0
    num_planned: int = 0
    num_computed: int = 0
    prefill_target: int = 0
    adapter_slot: int | None = None
    last_planned: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_table: tuple[int, ...] = ()
    chain: PrefixChain | None = None
    num_named: int = 0
    num_cached_tokens: int = 0
    awaited: bytes | None = None

    @property
    def is_flex(self) -> bool:
        """Whether it is of the background class."""
        return self.spec.tier is ServiceTier.FLEX

    @property
    def key(self) -> tuple[bool, int, int]:
        """Sort key within a tenant: who goes first."""
        return (self.is_flex, self.spec.priority, self.order)

    @property
    def running_key(self) -> tuple[bool, int]:
        """Sort key of what runs, over all tenants, whose priorities do not compare: who gives way last."""
        return (self.is_flex and not self.has_aged, self.order)

    @property
    def num_tokens(self) -> int:
        """Prompt and sampled tokens, counting plans in flight."""
        return self.spec.num_prompt_tokens + self.num_planned

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, failed or been aborted."""
        return self.status is SequenceStatus.FINISHED

    @property
    def is_prefilling(self) -> bool:
        """Whether part of the prompt (or of what is recomputed) is still to be planned."""
        return self.num_computed < self.prefill_target

    @property
    def remaining_tokens(self) -> int:
        """The most tokens that may still be sampled."""
        return self.max_new_tokens - self.num_planned

    def restart(self) -> None:
        """Forget everything computed: keys and values of prompt and generated tokens are computed again."""
        self.num_computed = 0
        self.num_named = 0
        self.adapter_slot = None
        self.block_ids = []
        self.block_table = ()

    def finish_reason(self, token_id: int) -> Literal["stop", "length"] | None:
        """Why the sequence ends with its newest committed token, or None if it goes on."""
        if token_id in self.spec.stop_token_ids and self.num_generated >= self.spec.min_new_tokens:
            return "stop"
        return "length" if self.num_generated >= self.max_new_tokens else None


def sequence_key(sequence: Sequence) -> tuple[bool, int, int]:
    """`sequence.key`, for sorting."""
    return sequence.key


def running_key(sequence: Sequence) -> tuple[bool, int]:
    """`sequence.running_key`, for sorting."""
    return sequence.running_key
