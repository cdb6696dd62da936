"""Which adapters are fetched and loaded next.

Waiters that have waited too long go first, by age; then the tenants take turns, the least served first. The
oldest of the overdue whose adapter finds no room gets a reservation, so that adapters in constant use cannot
keep it out. Training adapters are loaded strictly in the order of their jobs: a large one is not overtaken
for ever.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, zip_longest
from math import inf
from typing import NamedTuple

from weft_scheduler.entries import AdapterState, Entry
from weft_scheduler.state import SchedulerState


class Demand(NamedTuple):
    """A missing adapter and since when it is waited for."""

    entry: Entry
    since_s: float
    is_aged: bool


def bring_adapters_nearer(state: SchedulerState, now_s: float) -> None:
    """Start the fetches, loads and evictions of this plan."""
    residency = state.residency
    residency.advance(now_s, state.committed)
    residency.try_finish_reservation()
    if not residency.missing:
        return
    demands = _in_order(state, now_s)
    _load(state, demands)
    _reserve(state, demands)
    _fetch(state, demands)


def _in_order(state: SchedulerState, now_s: float) -> list[Demand]:
    overdue: list[Demand] = []
    others: list[Demand] = []
    for entry, since_s in chain(_training_demand(state, now_s), _inference_demand(state)):
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
    """Give the oldest overdue adapter that is in host memory a reservation."""
    candidates = [d.entry for d in demands if d.is_aged and d.entry.state is AdapterState.HOST]
    if not candidates or state.residency.reservation is not None:
        return
    drain: defaultdict[str, int] = defaultdict(int)
    for sequence in state.running:
        if sequence.spec.adapter is not None:
            drain[sequence.spec.adapter] = max(drain[sequence.spec.adapter], sequence.remaining_tokens)
    first_in_line = _first_missing_training(state)
    for entry in candidates:
        if _is_next(entry, first_in_line) and state.residency.try_reserve(entry, drain.__getitem__):
            return


def _fetch(state: SchedulerState, demands: list[Demand]) -> None:
    """Fetch in order while host memory has room: later ones never take the room of earlier ones."""
    is_full = False
    for demand in demands:
        entry = demand.entry
        if entry.state is not AdapterState.ABSENT or entry.has_failed:
            continue
        is_full = is_full or not state.residency.room_to_fetch(entry)
        if entry.is_training or not is_full:
            state.residency.fetch(entry)


def _is_next(entry: Entry, first_in_line: Entry | None) -> bool:
    return not entry.is_training or entry is first_in_line


def _first_missing_training(state: SchedulerState) -> Entry | None:
    missing = state.residency.missing
    entries = (missing.get(job.adapter) for job in state.training.jobs.values())
    return next((entry for entry in entries if entry is not None and not entry.has_failed), None)


def _training_demand(state: SchedulerState, now_s: float) -> Iterator[tuple[Entry, float]]:
    """Missing adapters of jobs, in the order of the jobs."""
    for job in state.training.jobs.values():
        entry = state.residency.missing.get(job.adapter)
        if entry is not None:
            if job.waiting_since_s is None:
                job.waiting_since_s = now_s
            yield entry, job.waiting_since_s


def _inference_demand(state: SchedulerState) -> list[tuple[Entry, float]]:
    """Missing adapters of waiting requests, tenants taking turns, and since when each is waited for."""
    missing = state.residency.missing
    by_tenant = []
    for tenant in sorted(state.waiting.tenants, key=state.shares.tag):
        heads = [seq for seq in state.waiting.heads(tenant) if seq.spec.adapter in missing]
        by_tenant.append([(missing[seq.spec.adapter or ""], seq.waiting_since_s) for seq in heads])
    return [item for turn in zip_longest(*by_tenant) for item in turn if item is not None]
