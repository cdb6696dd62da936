"""Who waits: sequences that have no place yet, by tenant and by what they wait for.

Keeps the first of every queue at hand, so that thousands of waiters and adapters cost a plan nothing. Owns
the order within a tenant; which tenant is next, and whether a sequence can start, is decided elsewhere.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from weft_scheduler.requests import Sequence, sequence_key

FLEX_TURN = 4
"""While flex requests of a tenant are overdue beside its default ones, every fourth admission is flex."""


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


_Lane: TypeAlias = tuple[bool, bytes | None]
_Lanes: TypeAlias = dict[_Lane, list[Sequence]]


class WaitingQueue:
    """Waiting sequences by tenant, adapter, tier and awaited contents, each queue in the tenant's order.

    Those that wait for contents queue apart, so that they hold up nobody else.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.backlogs: dict[str, Backlog] = {}
        self._queues: dict[str, dict[str | None, _Lanes]] = {}
        self._heads: dict[str, list[Sequence]] = {}
        self._tenants: defaultdict[str | None, dict[str, None]] = defaultdict(dict)
        self._num_flex: Counter[str] = Counter()
        self._num_since_flex: Counter[str] = Counter()
        self._num_waiting = 0

    def __len__(self) -> int:
        """Sequences waiting."""
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """All waiting sequences, in no particular order."""
        for adapters in self._queues.values():
            for lanes in adapters.values():
                for queue in lanes.values():
                    yield from queue

    @property
    def tenants(self) -> list[str]:
        """Tenants with waiting sequences."""
        return list(self._queues)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        tenant, adapter = sequence.spec.tenant, sequence.spec.adapter
        heads = self._heads.setdefault(tenant, [])
        lanes = self._queues.setdefault(tenant, {}).setdefault(adapter, {})
        queue = lanes.setdefault(_lane(sequence), [])
        former = queue[0] if queue else None
        insort(queue, sequence, key=sequence_key)
        if queue[0] is sequence:
            if former is not None:
                _discard(heads, former)
            insort(heads, sequence, key=sequence_key)
        self._tenants[adapter][tenant] = None
        self._num_waiting += 1
        self._num_flex[tenant] += sequence.is_flex
        self.backlogs[tenant] = self.backlogs.get(tenant, Backlog()).plus(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out.

        Raises:
            KeyError: it does not wait.
        """
        tenant, adapter = sequence.spec.tenant, sequence.spec.adapter
        lanes = self._queues[tenant][adapter]
        queue = lanes[_lane(sequence)]
        was_first = queue[0] is sequence
        _discard(queue, sequence)
        self._num_waiting -= 1
        self._num_flex[tenant] -= sequence.is_flex
        self.backlogs[tenant] = self.backlogs[tenant].plus(sequence, sign=-1)
        if was_first:
            _discard(self._heads[tenant], sequence)
            if queue:
                insort(self._heads[tenant], queue[0], key=sequence_key)
        if not queue:
            del lanes[_lane(sequence)]
        if not lanes:
            self._forget(tenant, adapter)

    def set_apart(self, sequence: Sequence, awaited: bytes) -> None:
        """Let a waiting sequence wait for these contents, in a queue with the others that do."""
        self.remove(sequence)
        sequence.awaited = awaited
        self.add(sequence)

    # ------------------------------------------------------------ who is next

    def heads(self, tenant: str) -> Collection[Sequence]:
        """The first waiter of each of the tenant's queues, who goes first first."""
        return self._heads.get(tenant, ())

    def heads_among(self, tenant: str, adapters: Collection[str]) -> Collection[Sequence]:
        """Those heads that want one of `adapters` or none; the cost is that of the smaller of the two."""
        heads = self.heads(tenant)
        if len(heads) <= len(adapters) + 1:
            return [seq for seq in heads if seq.spec.adapter is None or seq.spec.adapter in adapters]
        queues = self._queues[tenant]
        wanted = [queues[adapter] for adapter in (None, *adapters) if adapter in queues]
        return sorted((queue[0] for lanes in wanted for queue in lanes.values()), key=sequence_key)

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
        if not self._num_flex[tenant] or self._num_since_flex[tenant] < FLEX_TURN - 1:
            return []
        heads = self.heads(tenant)
        flex = [sequence for sequence in heads if sequence.is_flex]
        is_due = len(flex) < len(heads) and any(sequence.arrived_s <= since_s for sequence in flex)
        return flex if is_due else []

    # ------------------------------------------------------------ by adapter

    def waiters_of(self, adapter: str) -> list[tuple[Sequence, int]]:
        """By tenant, the first waiter of an adapter and how many there are."""
        waiters = []
        for tenant in self._tenants.get(adapter, ()):
            lanes = self._queues[tenant][adapter].values()
            first = min((queue[0] for queue in lanes), key=sequence_key)
            waiters.append((first, sum(map(len, lanes))))
        return waiters

    def of_adapter(self, adapter: str) -> list[Sequence]:
        """All waiters of one adapter."""
        queues = [self._queues[tenant][adapter].values() for tenant in self._tenants.get(adapter, ())]
        return [sequence for lanes in queues for queue in lanes for sequence in queue]

    def _forget(self, tenant: str, adapter: str | None) -> None:
        """A tenant has no waiters of an adapter any more."""
        del self._queues[tenant][adapter]
        del self._tenants[adapter][tenant]
        if not self._tenants[adapter]:
            del self._tenants[adapter]
        if not self._queues[tenant]:
            del self._queues[tenant], self._heads[tenant], self.backlogs[tenant], self._num_flex[tenant]
            self._num_since_flex.pop(tenant, None)


def _lane(sequence: Sequence) -> _Lane:
    return (sequence.is_flex, sequence.awaited)


def _discard(ordered: list[Sequence], sequence: Sequence) -> None:
    idx = bisect_left(ordered, sequence.key, key=sequence_key)
    if idx == len(ordered) or ordered[idx] is not sequence:
        raise KeyError(sequence.spec.sequence_id)
    del ordered[idx]
