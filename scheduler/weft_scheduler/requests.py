"""Generation requests: what is asked for, how far each sequence is, and who waits.

A sequence's state runs ahead of the device: it advances when a plan is made (`num_computed`, `num_planned`),
and what is known for certain follows when the plan is committed (`num_generated`). Owns no blocks, slots or
clocks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, TypeAlias

from weft_scheduler.prefix import PrefixChain, PrefixSpec

FLEX_TURN = 4
"""While flex requests of a tenant are overdue beside its default ones, every fourth admission is flex."""


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


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits of one tenant: sequences, the price of their prompts, the most tokens they may get."""

    num_waiting: int = 0
    prompt_price_s: float = 0.0
    max_tokens: int = 0

    def plus(self, sequence: Sequence, sign: int = 1) -> Backlog:
        """With one sequence more, or less."""
        return Backlog(
            self.num_waiting + sign,
            self.prompt_price_s + sign * sequence.prompt_price_s,
            self.max_tokens + sign * sequence.remaining_tokens,
        )


_Lane: TypeAlias = tuple[str | None, bool, bytes | None]


class WaitingQueue:
    """Waiting sequences by tenant, adapter, tier and awaited contents, each queue ordered by (priority,
    arrival).

    Only the heads of the queues are ever looked at, so that thousands of waiters of one adapter cost nothing.
    Those that wait for contents queue apart, so that they hold up nobody else.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.backlogs: dict[str, Backlog] = {}
        self._queues: dict[str, dict[_Lane, list[Sequence]]] = {}
        self._heads: dict[str, list[Sequence]] = {}
        self._num_since_flex: Counter[str] = Counter()
        self._num_waiting = 0

    def __len__(self) -> int:
        """Sequences waiting."""
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """All waiting sequences, in no particular order."""
        for queues in self._queues.values():
            for queue in queues.values():
                yield from queue

    @property
    def tenants(self) -> list[str]:
        """Tenants with waiting sequences."""
        return list(self._queues)

    def add(self, sequence: Sequence) -> bool:
        """Queue a sequence; returns whether its tenant had nothing waiting before."""
        is_new = sequence.spec.tenant not in self._queues
        queue = self._queues.setdefault(sequence.spec.tenant, {}).setdefault(_lane(sequence), [])
        insort(queue, sequence, key=sequence_key)
        if queue[0] is sequence:
            self._heads.pop(sequence.spec.tenant, None)
        self._num_waiting += 1
        backlog = self.backlogs.get(sequence.spec.tenant, Backlog())
        self.backlogs[sequence.spec.tenant] = backlog.plus(sequence)
        return is_new

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out.

        Raises:
            KeyError: it does not wait.
        """
        tenant = sequence.spec.tenant
        queues = self._queues[tenant]
        queue = queues[_lane(sequence)]
        idx = bisect_left(queue, sequence.key, key=sequence_key)
        if idx == len(queue) or queue[idx] is not sequence:
            raise KeyError(sequence.spec.sequence_id)
        del queue[idx]
        if idx == 0:
            self._heads.pop(tenant, None)
        self._num_waiting -= 1
        self.backlogs[tenant] = self.backlogs[tenant].plus(sequence, sign=-1)
        if not queue:
            del queues[_lane(sequence)]
        if not queues:
            del self._queues[tenant], self.backlogs[tenant]
            self._num_since_flex.pop(tenant, None)

    def took_turn(self, sequence: Sequence) -> None:
        """A sequence is being admitted: count the tenant's turns."""
        if sequence.is_flex:
            self._num_since_flex.pop(sequence.spec.tenant, None)
        else:
            self._num_since_flex[sequence.spec.tenant] += 1

    def overdue_flex(self, tenant: str, since_s: float) -> list[Sequence]:
        """Flex heads of a tenant whose turn it is, if one of them arrived at `since_s` or before; else none.

        It is their turn after three default admissions; so where default requests wait too, flex ones get
        every fourth admission.
        """
        heads = self.heads(tenant)
        if not heads or self._num_since_flex[tenant] < FLEX_TURN - 1:
            return []
        flex = [sequence for sequence in heads if sequence.is_flex]
        is_due = len(flex) < len(heads) and any(sequence.arrived_s <= since_s for sequence in flex)
        return flex if is_due else []

    def set_apart(self, sequence: Sequence, awaited: bytes) -> None:
        """Let a waiting sequence wait for these contents, in a queue with the others that do."""
        self.remove(sequence)
        sequence.awaited = awaited
        self.add(sequence)

    def heads(self, tenant: str) -> Collection[Sequence]:
        """The first waiter of each of the tenant's queues, who goes first first."""
        if tenant not in self._queues:
            return ()
        heads = self._heads.get(tenant)
        if heads is None:
            heads = sorted((queue[0] for queue in self._queues[tenant].values()), key=sequence_key)
            self._heads[tenant] = heads
        return heads

    def of_adapter(self, adapter: str) -> list[Sequence]:
        """All waiters of one adapter."""
        return [
            seq
            for queues in self._queues.values()
            for lane, queue in queues.items()
            if lane[0] == adapter
            for seq in queue
        ]


def _lane(sequence: Sequence) -> _Lane:
    return (sequence.spec.adapter, sequence.is_flex, sequence.awaited)
