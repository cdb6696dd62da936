"""Generation requests: what is asked for, how far each sequence is, and who waits.

A sequence's state runs ahead of the device: it advances when a plan is made (`num_computed`, `num_planned`),
and what is known for certain follows when the plan is committed (`num_generated`). Owns no blocks, slots or
clocks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from weft_scheduler.prefix import PrefixChain, PrefixSpec


class RequestTooLarge(ValueError):
    """A request, pack or adapter that can never run here; the message gives the value and the limit."""


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One choice to generate. `num_prompt_tokens` includes text generated before a resubmission.

    At most `max_new_tokens` tokens are generated; a token of `stop_token_ids` ends the sequence once
    `min_new_tokens` tokens (it included) have been generated. `adapter` is a digest, None is the base model;
    `adapter_elements` is 0 if its size is not known before it is fetched. Within a tenant, lower `priority`
    goes first. Without `prefix` the request neither reads the prefix cache nor adds to it.
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
    is unique and grows with arrival. Everything below `prefill_target` is computed as prompt.

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
    def key(self) -> tuple[int, int]:
        """Sort key: who goes first, and, reversed, who is preempted first."""
        return (self.spec.priority, self.order)

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


def sequence_key(sequence: Sequence) -> tuple[int, int]:
    """`sequence.key`, for sorting."""
    return sequence.key


class WaitingQueue:
    """Waiting sequences by tenant, adapter and awaited contents, each queue ordered by (priority, arrival).

    Only the heads of the queues are ever looked at, so that thousands of waiters of one adapter cost nothing.
    Those that wait for contents queue apart, so that they hold up nobody else.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._lanes: dict[str, dict[str | None, dict[bytes | None, list[Sequence]]]] = {}
        self._heads: dict[str, list[Sequence]] = {}
        self._tenants: dict[str | None, dict[str, None]] = {}
        self._num_waiting = 0

    def __len__(self) -> int:
        """Sequences waiting."""
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """All waiting sequences, in no particular order."""
        for lanes_by_adapter in self._lanes.values():
            for lanes in lanes_by_adapter.values():
                for queue in lanes.values():
                    yield from queue

    @property
    def tenants(self) -> list[str]:
        """Tenants with waiting sequences."""
        return list(self._lanes)

    def add(self, sequence: Sequence) -> bool:
        """Queue a sequence; returns whether its tenant had nothing waiting before."""
        tenant, adapter = sequence.spec.tenant, sequence.spec.adapter
        is_new = tenant not in self._lanes
        heads = self._heads.setdefault(tenant, [])
        lanes = self._lanes.setdefault(tenant, {}).setdefault(adapter, {})
        queue = lanes.setdefault(sequence.awaited, [])
        former = queue[0] if queue else None
        insort(queue, sequence, key=sequence_key)
        if queue[0] is sequence:
            if former is not None:
                _discard(heads, former)
            insort(heads, sequence, key=sequence_key)
        self._tenants.setdefault(adapter, {})[tenant] = None
        self._num_waiting += 1
        return is_new

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out.

        Raises:
            KeyError: it does not wait.
        """
        tenant, adapter = sequence.spec.tenant, sequence.spec.adapter
        queue = self._lanes[tenant][adapter][sequence.awaited]
        was_first = queue[0] is sequence
        _discard(queue, sequence)
        self._num_waiting -= 1
        if was_first:
            _discard(self._heads[tenant], sequence)
            if queue:
                insort(self._heads[tenant], queue[0], key=sequence_key)
        if not queue:
            self._forget_lane(tenant, adapter, sequence.awaited)

    def set_apart(self, sequence: Sequence, awaited: bytes) -> None:
        """Let a waiting sequence wait for these contents, in a queue with the others that do."""
        self.remove(sequence)
        sequence.awaited = awaited
        self.add(sequence)

    def heads(self, tenant: str) -> Collection[Sequence]:
        """The first waiter of each of the tenant's queues, first come first."""
        return self._heads.get(tenant, ())

    def heads_among(self, tenant: str, adapters: Collection[str]) -> list[Sequence]:
        """Those heads that want one of `adapters` or none; the cost is that of the smaller of the two."""
        heads = self.heads(tenant)
        if len(heads) <= len(adapters) + 1:
            return [seq for seq in heads if seq.spec.adapter is None or seq.spec.adapter in adapters]
        lanes = self._lanes[tenant]
        found = [queue[0] for key in (None, *adapters) if key in lanes for queue in lanes[key].values()]
        return sorted(found, key=sequence_key)

    def firsts_of(self, adapter: str) -> list[tuple[Sequence, int]]:
        """Of each tenant with waiters of an adapter, the first of them, and how many there are."""
        found = []
        for tenant in self._tenants.get(adapter, ()):
            queues = self._lanes[tenant][adapter].values()
            first = min((queue[0] for queue in queues), key=sequence_key)
            found.append((first, sum(map(len, queues))))
        return found

    def of_adapter(self, adapter: str) -> list[Sequence]:
        """All waiters of one adapter."""
        return [
            sequence
            for tenant in self._tenants.get(adapter, ())
            for queue in self._lanes[tenant][adapter].values()
            for sequence in queue
        ]

    def _forget_lane(self, tenant: str, adapter: str | None, awaited: bytes | None) -> None:
        lanes_by_adapter = self._lanes[tenant]
        del lanes_by_adapter[adapter][awaited]
        if lanes_by_adapter[adapter]:
            return
        del lanes_by_adapter[adapter], self._tenants[adapter][tenant]
        if not self._tenants[adapter]:
            del self._tenants[adapter]
        if not lanes_by_adapter:
            del self._lanes[tenant], self._heads[tenant]


def _discard(ordered: list[Sequence], sequence: Sequence) -> None:
    idx = bisect_left(ordered, sequence.key, key=sequence_key)
    if idx == len(ordered) or ordered[idx] is not sequence:
        raise KeyError(sequence.spec.sequence_id)
    del ordered[idx]
