"""Which adapters are fetched and loaded next.

Waiters that have waited too long go first, by age; then the tenants take turns, the least served first. The
oldest of the overdue whose adapter finds no room gets a reservation, so that adapters in constant use cannot
keep it out. Training adapters are loaded strictly in the order of their jobs: a large one is not overtaken
for ever.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import chain, zip_longest

from weft_scheduler.residency import AdapterState, Entry
from weft_scheduler.state import SchedulerState


def bring_adapters_nearer(state: SchedulerState, now_s: float) -> None:
    """Start the fetches, loads and evictions of this plan."""
    residency = state.residency
    residency.advance(now_s, state.committed)
    residency.try_finish_reservation()
    if not residency.missing:
        return
    overdue: list[tuple[float, Entry]] = []
    for entry, since_s in chain(_training_demand(state, now_s), _inference_demand(state)):
        if now_s - since_s >= state.limits.max_wait_s:
            overdue.append((since_s, entry))
        else:
            _bring_nearer(state, entry, is_aged=False)
    if overdue:
        _serve_overdue(state, overdue)


def _serve_overdue(state: SchedulerState, overdue: list[tuple[float, Entry]]) -> None:
    overdue.sort(key=lambda item: item[0])
    for _, entry in overdue:
        _bring_nearer(state, entry, is_aged=True)
    if state.residency.reservation is not None:
        return
    drain: defaultdict[str, int] = defaultdict(int)
    for sequence in state.running:
        if sequence.spec.adapter is not None:
            drain[sequence.spec.adapter] = max(drain[sequence.spec.adapter], sequence.remaining_tokens)
    for _, entry in overdue:
        if entry.state is AdapterState.HOST and state.residency.try_reserve(entry, drain.__getitem__):
            return


def _bring_nearer(state: SchedulerState, entry: Entry, *, is_aged: bool) -> None:
    residency = state.residency
    if entry.state is AdapterState.ABSENT:
        if not entry.has_failed and (entry.is_training or residency.room_to_fetch(entry)):
            residency.fetch(entry)
    elif entry.state is AdapterState.HOST:
        residency.try_load(entry, is_aged=is_aged)


def _training_demand(state: SchedulerState, now_s: float) -> list[tuple[Entry, float]]:
    """The first job that waits for its adapter (those behind it wait their turn), since when it waits."""
    for job in state.training.jobs.values():
        entry = state.residency.missing.get(job.adapter)
        if entry is not None and not entry.has_failed:
            if job.waiting_since_s is None:
                job.waiting_since_s = now_s
            return [(entry, job.waiting_since_s)]
    return []


def _inference_demand(state: SchedulerState) -> list[tuple[Entry, float]]:
    """Missing adapters of waiting requests, tenants taking turns, and since when each is waited for."""
    missing = state.residency.missing
    by_tenant = []
    for tenant in sorted(state.waiting.tenants, key=state.inference_shares.tag):
        heads = [seq for seq in state.waiting.heads(tenant) if seq.spec.adapter in missing]
        by_tenant.append([(missing[seq.spec.adapter or ""], seq.waiting_since_s) for seq in heads])
    return [item for turn in zip_longest(*by_tenant) for item in turn if item is not None]
