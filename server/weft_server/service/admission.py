"""Who may wait: bounded queues, and who is refused when they are full.

A queue is what a tenant has asked for and not begun to get: choices that wait for their first token. There
are two limits, one for each tenant and one for all together. When the first is exceeded, the tenant itself
must give; when the second is, the tenant whose queue is the longest for its weight. Of the tenant that must
give, flex requests go before default ones, and the newest first. A request whose answer has begun is never
refused.

Pure: no clocks, no event loop; it learns from its owner when a choice gets its first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from weft_server.errors import InvalidRequest, Overloaded
from weft_server.protocol import Tier

MIN_RETRY_S = 1.0
MAX_RETRY_S = 120.0
"""OpenAI's SDK does not retry what is told to come back later than this."""

DEFAULT_MAX_QUEUED = 1024
TOTAL_FACTOR = 8
"""How many full queues fit in the server's limit, by default."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """The most choices that may wait for their first token: of a tenant, and in all."""

    per_tenant: int = DEFAULT_MAX_QUEUED
    total: int = TOTAL_FACTOR * DEFAULT_MAX_QUEUED

    @classmethod
    def of(cls, per_tenant: int, total: int | None) -> QueueLimits:
        """Limits as configured: without a total, eight times the limit of a tenant."""
        return cls(per_tenant, TOTAL_FACTOR * per_tenant if total is None else total)


class Reason(Enum):
    """Which limit was reached."""

    TENANT_QUEUE = "tenant_queue"
    SERVER_QUEUE = "server_queue"


@dataclass(slots=True, eq=False)
class Ticket:
    """A request's place in its tenant's queue: `waiting` are the indices of its choices without a token.

    `refuse` is called at most once, with the error, should the request be refused while it waits.
    """

    tenant: str
    tier: Tier
    waiting: set[int]
    refuse: Callable[[Overloaded], None]
    has_begun: bool = False
    is_refused: bool = False


@dataclass(slots=True)
class _Queue:
    """A tenant's tickets that may still be refused, by tier, in order of arrival, and all its waiters."""

    num_waiting: int = 0
    refusable: dict[Tier, dict[int, Ticket]] = field(default_factory=lambda: {"default": {}, "flex": {}})

    def newest_first(self) -> Iterator[Ticket]:
        """Who may be refused, in the order in which they are."""
        for tier in ("flex", "default"):
            yield from reversed(self.refusable[tier].values())


class Admission:
    """The queues of all tenants."""

    def __init__(
        self,
        limits: QueueLimits,
        *,
        weights: Callable[[], Mapping[str, float]] = dict,
        drain_s: Callable[[str, int], float | None] = lambda _tenant, _num_waiting: None,
        on_refused: Callable[[str, Reason, int], None] = lambda _tenant, _reason, _num: None,
        on_change: Callable[[str, int], None] = lambda _tenant, _num_waiting: None,
    ) -> None:
        """
        Args:
            limits: how many may wait.
            weights: the tenants' weights now; who is not named has weight 1.
            drain_s: predicted seconds until so many waiting choices of a tenant have begun; None: not known.
            on_refused: told tenant, reason and number of choices.
            on_change: told how many choices of a tenant wait now.
        """
        self._limits = limits
        self._weights = weights
        self._drain_s = drain_s
        self._on_refused = on_refused
        self._on_change = on_change
        self._queues: dict[str, _Queue] = {}
        self._total = 0

    def num_waiting(self, tenant: str) -> int:
        """Choices of a tenant that wait for their first token."""
        queue = self._queues.get(tenant)
        return 0 if queue is None else queue.num_waiting

    def enter(
        self, tenant: str, tier: Tier, choices: set[int], refuse: Callable[[Overloaded], None]
    ) -> Ticket:
        """Queue a request with these choices; `leave` must follow. Others may be refused in its place.

        Raises:
            InvalidRequest: it has more choices than may ever wait.
            Overloaded: it is the one to be refused.
        """
        self._check_size(len(choices))
        ticket = Ticket(tenant, tier, set(choices), refuse)
        queue = self._queues.setdefault(tenant, _Queue())
        if choices:
            queue.refusable[tier][id(ticket)] = ticket
        self._count(ticket, len(choices))
        victims = self._victims(ticket)
        for victim, reason in victims:
            error = self._error(victim, reason)
            victim.is_refused = True
            self._on_refused(victim.tenant, reason, len(victim.waiting))
            self.leave(victim)
            if victim is ticket:
                raise error
            victim.refuse(error)
        return ticket

    def begin(self, ticket: Ticket, choice: int | None = None) -> None:
        """A choice has got its first token; or, without one, the response has begun all the same."""
        if not ticket.has_begun:
            ticket.has_begun = True
            self._keep(ticket)
        if choice in ticket.waiting:
            ticket.waiting.discard(choice)
            self._count(ticket, -1)

    def leave(self, ticket: Ticket) -> None:
        """The request has ended, however; what still waited of it does no longer."""
        self._keep(ticket)
        self._count(ticket, -len(ticket.waiting))
        ticket.waiting.clear()

    def _check_size(self, num_choices: int) -> None:
        most = min(self._limits.per_tenant, self._limits.total)
        if num_choices > most:
            raise InvalidRequest(
                f"This request has {num_choices} choices; at most {most} may wait for their first token at a "
                "time. Send several requests.",
                code="too_many_choices",
            )

    def _victims(self, newcomer: Ticket) -> list[tuple[Ticket, Reason]]:
        """Who must go so that both limits hold: the newcomer alone, or others that make room for it."""
        if self.num_waiting(newcomer.tenant) <= self._limits.per_tenant and self._total <= self._limits.total:
            return []
        sizes = {tenant: queue.num_waiting for tenant, queue in self._queues.items()}
        candidates = {tenant: queue.newest_first() for tenant, queue in self._queues.items()}
        total = self._total
        victims: list[tuple[Ticket, Reason]] = []
        while True:
            if sizes[newcomer.tenant] > self._limits.per_tenant:
                tenant, reason = newcomer.tenant, Reason.TENANT_QUEUE
            elif total > self._limits.total:
                tenant, reason = self._greediest(sizes), Reason.SERVER_QUEUE
            else:
                return victims
            victim = next(candidates[tenant], None)
            if victim is None:
                # All that wait there have begun to be answered: the next in line gives.
                del sizes[tenant]
                continue
            if victim is newcomer:
                return [(newcomer, reason)]
            victims.append((victim, reason))
            sizes[tenant] -= len(victim.waiting)
            total -= len(victim.waiting)

    def _greediest(self, sizes: Mapping[str, int]) -> str:
        """The tenant with the longest queue for its weight."""
        weights = self._weights()
        return max(sizes, key=lambda tenant: sizes[tenant] / weights.get(tenant, 1.0))

    def _error(self, victim: Ticket, reason: Reason) -> Overloaded:
        num_waiting = self.num_waiting(victim.tenant)
        drain_s = self._drain_s(victim.tenant, num_waiting)
        wait_s = min(max(drain_s or MIN_RETRY_S, MIN_RETRY_S), MAX_RETRY_S)
        limit = f"the limit is {self._limits.per_tenant} (--max-queued-requests)"
        if reason is Reason.SERVER_QUEUE:
            limit = (
                f"all tenants together have reached the limit of {self._limits.total} "
                "(--max-queued-requests-total), and this queue is the longest for its tenant's weight"
            )
        return Overloaded(
            f"{num_waiting} choices of this tenant wait for their first token, {len(victim.waiting)} of this "
            f"request among them; {limit}. Try again in {wait_s:.0f} s, when the queue should have drained.",
            code="queue_full",
            retry_after_s=wait_s,
        )

    def _keep(self, ticket: Ticket) -> None:
        """It is not to be refused any more."""
        queue = self._queues.get(ticket.tenant)
        if queue is not None:
            queue.refusable[ticket.tier].pop(id(ticket), None)

    def _count(self, ticket: Ticket, change: int) -> None:
        queue = self._queues.get(ticket.tenant)
        if queue is None:
            return
        queue.num_waiting += change
        self._total += change
        self._on_change(ticket.tenant, queue.num_waiting)
        if not queue.num_waiting and not any(queue.refusable.values()):
            del self._queues[ticket.tenant]
