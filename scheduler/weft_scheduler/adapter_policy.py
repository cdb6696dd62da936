"""Which adapters are fetched and loaded next.

Waiters that have waited too long go first, by age; then the tenants take turns, the least served first, and
within a tenant's turn the adapter that most of its requests wait for, so that a load serves many. Adapters of
the overdue that find no room get reservations, oldest first, so that adapters in constant use cannot keep
them out. Training adapters are loaded strictly in the order of their jobs: a large one is not overtaken for
ever.

The bound: with room for `k` adapters at a time under reservations, the adapter of the `n`-th oldest overdue
request is loaded after at most ceil(n / k) drains, a drain being the time that the longest running sequence
may still take, and a load.

Only adapters in host memory are candidates for loads, and they are few: as many as the arena holds. All
missing ones are looked at only when host memory has room to fetch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import zip_longest
from math import inf
from typing import NamedTuple

from weft_scheduler.entries import AdapterState, Entry
from weft_scheduler.requests import Sequence
from weft_scheduler.state import SchedulerState


class Demand(NamedTuple):
    """A missing adapter and since when it is waited for."""

    entry: Entry
    since_s: float
    is_aged: bool


def bring_adapters_nearer(state: SchedulerState, now_s: float) -> None:
    """Start the fetches, moves, loads and evictions of this plan."""
    residency = state.residency
    residency.advance(now_s, state.committed)
    residency.finish_reservations()
    residency.settle_pins()
    if not residency.missing:
        return
    training = _training_demand(state, now_s)
    on_host = [entry for entry in residency.on_host.values() if not entry.is_training]
    demands = _in_order(state, now_s, training, on_host)
    _load(state, demands)
    _reserve(state, demands)
    _fetch(state, training, now_s)


def _in_order(
    state: SchedulerState, now_s: float, training: list[tuple[Entry, float]], wanted: Iterable[Entry]
) -> list[Demand]:
    """The adapters of jobs and those `wanted` by requests or pins: the overdue by age, then the others."""
    overdue: list[Demand] = []
    others: list[Demand] = []
    for entry, since_s in [*training, *_request_demand(state, wanted)]:
        is_aged = now_s - since_s >= state.limits.max_wait_s
        (overdue if is_aged else others).append(Demand(entry, since_s, is_aged))
    overdue.sort(key=lambda demand: demand.since_s)
    return overdue + others


def _load(state: SchedulerState, demands: list[Demand]) -> None:
    """Load what is in host memory and finds room; a training adapter only after all those of earlier jobs.

    Where one found no room, none that is as large need try.
    """
    too_large = {True: inf, False: inf}
    first_in_line = _first_missing_training(state)
    for demand in demands:
        entry = demand.entry
        if entry.state is not AdapterState.HOST or not _is_next(entry, first_in_line):
            continue
        if entry.is_training:
            if state.residency.try_load(entry, is_aged=demand.is_aged):
                first_in_line = _first_missing_training(state)
        elif entry.num_elements >= too_large[demand.is_aged]:
            continue
        elif not state.residency.try_load(entry, is_aged=demand.is_aged):
            too_large[demand.is_aged] = entry.num_elements


def _reserve(state: SchedulerState, demands: list[Demand]) -> None:
    """Give overdue adapters in host memory reservations, oldest first, while the arena's share for them
    lasts.
    """
    candidates = [d.entry for d in demands if d.is_aged and d.entry.state is AdapterState.HOST]
    if not candidates:
        return
    drain: defaultdict[str, int] = defaultdict(int)
    for sequence in state.running:
        if sequence.spec.adapter is not None:
            drain[sequence.spec.adapter] = max(drain[sequence.spec.adapter], sequence.remaining_tokens)
    first_in_line = _first_missing_training(state)
    for entry in candidates:
        is_kept = entry.key in state.residency.reservations
        if is_kept or not _is_next(entry, first_in_line):
            continue
        if not state.residency.try_reserve(entry, drain.__getitem__):
            return


def _fetch(state: SchedulerState, training: list[tuple[Entry, float]], now_s: float) -> None:
    """Fetch in order while host memory has room: later ones never take the room of earlier ones."""
    residency = state.residency
    for entry, _ in training:
        if entry.state is AdapterState.ABSENT and entry.retry_at_s <= now_s:
            residency.fetch(entry)
    if not residency.staging.is_open:
        return
    absent = [
        entry
        for entry in residency.missing.values()
        if entry.state is AdapterState.ABSENT and not entry.is_training and entry.retry_at_s <= now_s
    ]
    for demand in _in_order(state, now_s, [], absent):
        if demand.entry.state is not AdapterState.ABSENT:
            continue
        if not residency.staging.try_open_for(demand.entry):
            return
        residency.fetch(demand.entry)


def _is_next(entry: Entry, first_in_line: Entry | None) -> bool:
    return not entry.is_training or entry is first_in_line


def _first_missing_training(state: SchedulerState) -> Entry | None:
    missing = state.residency.missing
    entries = (missing.get(job.adapter) for job in state.training.jobs.values())
    return next((entry for entry in entries if entry is not None and entry.retry_at_s < inf), None)


def _training_demand(state: SchedulerState, now_s: float) -> list[tuple[Entry, float]]:
    """Missing adapters of jobs, in the order of the jobs."""
    demand = []
    for job in state.training.jobs.values():
        entry = state.residency.missing.get(job.adapter)
        if entry is not None:
            if job.waiting_since_s is None:
                job.waiting_since_s = now_s
            demand.append((entry, job.waiting_since_s))
    return demand


def _request_demand(state: SchedulerState, wanted: Iterable[Entry]) -> list[tuple[Entry, float]]:
    """What requests wait for, tenants taking turns, and since when; last what is only pinned."""
    waiting = state.waiting
    by_tenant: defaultdict[str, list[tuple[int, Sequence, Entry]]] = defaultdict(list)
    pinned: list[tuple[Entry, float]] = []
    for entry in wanted:
        if entry.is_pinned and not entry.num_waiting:
            pinned.append((entry, entry.pinned_since_s))
        for head, num_waiting in waiting.waiters_of(entry.key):
            by_tenant[head.spec.tenant].append((num_waiting, head, entry))
    turns = []
    for tenant in sorted(by_tenant, key=state.shares.tag):
        heads = sorted((item for item in by_tenant[tenant] if _may_start_soon(state, item[1])), key=_turn)
        turns.append([(entry, head.waiting_since_s) for _, head, entry in heads])
    return [item for turn in zip_longest(*turns) for item in turn if item is not None] + pinned


def _may_start_soon(state: SchedulerState, head: Sequence) -> bool:
    """Whether a waiter would find a place under its tenant's concurrency once its adapter is there.

    Only as many of the tenant's older requests may be ahead of it as could start now; of a tenant that runs
    all it may, one request gets its adapter in advance.
    """
    tenant = head.spec.tenant
    most = state.max_concurrency.get(tenant)
    if most is None:
        return True
    ready = state.waiting.heads_among(tenant, state.residency.extents)
    num_ahead = sum(other.key < head.key for other in ready)
    return num_ahead < max(1, most - state.num_running[tenant])


def _turn(item: tuple[int, Sequence, Entry]) -> tuple[bool, int, int, int]:
    """Within a tenant: by tier and priority, then what most wait for, then by arrival."""
    num_waiting, head, _ = item
    return (head.is_flex, head.spec.priority, -num_waiting, head.order)
