"""Finetuning: which packs get blocks, and how many windows, slices and optimizer steps a plan takes.

Optimizer steps go first (their jobs stand still), then forward windows (they make waves wide; one that does
not fit is cut, one that is dear beside requests waits for a while), then the slices of the wave. Tenants take
turns by their shares when packs are admitted; those that are ahead of others whose finetuning could run sit
out, with their windows and from the next wave on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from math import inf

from weft_scheduler.budget import BudgetController
from weft_scheduler.draft import PlanDraft
from weft_scheduler.state import SchedulerState
from weft_scheduler.training import Job, Pack, PackStatus, Wave

LEAST_TRICKLE_INTERVAL, MOST_TRICKLE_INTERVAL = 8, 120
"""Bounds of the number of plans after which finetuning gets one unit, whatever the budget."""

DEAREST = 1.5
"""The most that a token of a window may take beside requests, as a multiple of what it takes without any,
where there is time without any (`has_idle_time`)."""

_MOST_DEMAND = 0.7

MAX_LEAD_S = 0.5
"""How far a tenant may be ahead of another tenant's runnable finetuning before its work must wait."""


def trickle_interval(percentile: float) -> int:
    """Plans of which one may be late without moving the percentile (0 to 100) of their times, with a fifth to
    spare."""
    late_share = max(1.0 - percentile / 100.0, 1e-3)
    return min(max(round(1.2 / late_share), LEAST_TRICKLE_INTERVAL), MOST_TRICKLE_INTERVAL)


def trickle_is_due(state: SchedulerState, budget: BudgetController) -> bool:
    """Whether this plan must take one unit of finetuning."""
    interval = trickle_interval(budget.targets.percentile)
    return state.num_idle_training_plans >= interval - 1 and is_runnable(state)


def is_runnable(state: SchedulerState) -> bool:
    """Whether a window, slice or optimizer step could be planned now."""
    return bool(state.training.alive) or any(True for _ in _due_jobs(state))


def runnable_tenants(state: SchedulerState, iteration: int) -> set[str]:
    """Tenants whose finetuning could run in this iteration, but for blocks that requests hold.

    A job whose optimizer step is under way or has just been counts: its next packs are about to come.
    """
    return _training_tenants(state, iteration, counts_queued=True)


def lead_limit(state: SchedulerState, tenants: Collection[str]) -> Callable[[str], float]:
    """By tenant, the tag beyond which its work must wait for the finetuning of the others among `tenants`."""
    tags = sorted((state.shares.tag(tenant), tenant) for tenant in tenants)[:2]

    def limit(tenant: str) -> float:
        others = (tag for tag, other in tags if other != tenant)
        return next(others, inf) + MAX_LEAD_S

    return limit


def _training_tenants(state: SchedulerState, iteration: int, *, counts_queued: bool) -> set[str]:
    """Tenants with packs alive, or a job at its optimizer step; with `counts_queued`, or packs in a queue."""
    tenants = {pack.spec.tenant for pack in state.training.alive}
    for job in state.training.jobs.values():
        if job.tenant is None or job.tenant in tenants:
            continue
        has_work = job.step_is_due or job.step_is_planned or (counts_queued and job.head() is not None)
        is_between_steps = 0 < iteration - job.last_planned <= state.limits.max_inflight
        if (has_work or is_between_steps) and state.residency.slot(job.adapter) is not None:
            tenants.add(job.tenant)
    return tenants


def _turns(state: SchedulerState, draft: PlanDraft) -> Callable[[Pack], bool]:
    """Whether a pack's tenant is not too far ahead of the others whose finetuning could run."""
    tenants = _training_tenants(state, draft.iteration, counts_queued=False)
    limit, tag = lead_limit(state, tenants), state.shares.tag
    in_turn = {tenant for tenant in tenants if tag(tenant) <= limit(tenant)}
    return lambda pack: pack.spec.tenant in in_turn


def num_kept_blocks(state: SchedulerState, now_s: float) -> int:
    """Blocks that new requests must leave to the next pack, because it has waited too long for them."""
    pack = _next_pack(state)
    if pack is None or now_s - pack.waiting_since_s < state.limits.max_training_wait_s:
        return 0
    if state.training.alive_tokens + pack.spec.num_tokens > state.limits.max_train_tokens:
        return 0
    return state.limits.num_blocks_for(pack.spec.num_tokens)


def plan_training(
    state: SchedulerState, draft: PlanDraft, budget_s: float, *, is_due: bool, may_be_empty: bool = False
) -> None:
    """Add units of finetuning within the budget; at least one if `is_due`, or if the plan would be empty and
    must not be.
    """
    if draft.must_finish_layer:
        finish_layer(state, draft)
    _admit_packs(state, draft)
    _add_steps(state, draft, budget_s)
    is_in_turn = _turns(state, draft)
    dearest = DEAREST if draft.forward and has_idle_time(state, draft, budget_s) else inf
    _add_windows(state, draft, budget_s, is_in_turn, dearest)
    _add_slices(state, draft, budget_s, is_in_turn)
    is_empty = not draft.forward and not _step_is_in_flight(state)
    if not draft.num_training_units and (is_due or (is_empty and not may_be_empty)):
        _force_one(state, draft)
    is_idle = is_runnable(state) and not draft.num_training_units
    state.num_idle_training_plans = state.num_idle_training_plans + 1 if is_idle else 0


def has_idle_time(state: SchedulerState, draft: PlanDraft, budget_s: float) -> bool:
    """Whether there is time without requests even if every plan with some takes `budget_s`, by the tokens
    that are decoded lately.

    The less is put beside requests then, the more of that time there is. Otherwise plans that take longer
    serve more requests at once, which saves more than dear windows cost.
    """
    longest_s = max(budget_s, draft.predicted_s)
    return state.demand.tokens_per_s(draft.now_s) * longest_s < _MOST_DEMAND


def plan_capped_training(state: SchedulerState, draft: PlanDraft, max_tokens: int, max_layers: int) -> None:
    """Add a fixed amount of finetuning, whatever it takes: due optimizer steps, and either forward windows of
    at most `max_tokens` tokens (one window if that is above 0) or the wave through `max_layers` layers.
    """
    training = state.training
    _admit_packs(state, draft)
    _add_steps(state, draft, inf)
    if training.wave is None:
        left = max_tokens
        for pack in training.alive:
            while pack.status is PackStatus.FORWARDING:
                num_tokens = training.most_forward(pack)
                is_over = num_tokens > left and (left < max_tokens or max_tokens <= 0)
                if is_over or not _add_window(state, draft, pack, inf, num_tokens):
                    return
                left -= num_tokens
        if left < max_tokens:
            return
    for _ in range(max_layers):
        wave = training.next_wave()
        if wave is None:
            return
        _add_slice(state, draft, wave, inf)
        finish_layer(state, draft)


def finish_layer(state: SchedulerState, draft: PlanDraft) -> None:
    """Take the wave to the end of the layer that it is in, whatever the budget."""
    training = state.training
    while training.wave is not None and not training.wave.is_between_layers:
        _add_slice(state, draft, training.wave, inf)


def withdraw(state: SchedulerState, draft: PlanDraft, num_slices: int, num_steps: int) -> None:
    """Of the backward slices and optimizer steps of the plan in flight only the first so many have run: take
    the others back, to be planned again.
    """
    for job in draft.stepped[num_steps:]:
        job.step_is_planned = False
    if num_slices < len(draft.backward):
        waves = dict.fromkeys(each.wave for each in draft.slices)
        for pack in state.training.rewind(waves, draft.backward[num_slices], draft.iteration):
            pack.block_ids = draft.freed.pop(pack)
            state.blocks.reclaim(pack.block_ids)
    draft.withdraw(num_slices, num_steps)


def _due_jobs(state: SchedulerState) -> Iterator[Job]:
    """Jobs whose optimizer step can be planned."""
    for job in state.training.jobs.values():
        if job.step_is_due and state.residency.slot(job.adapter) is not None:
            yield job


def _next_pack(state: SchedulerState) -> Pack | None:
    """The queued pack of the least served tenant whose adapter is on the device.

    What its packs have before them counts as served.
    """
    admitted_s: defaultdict[str, float] = defaultdict(float)
    for pack in state.training.alive:
        admitted_s[pack.spec.tenant] += state.remaining_price_s(pack)
    best: tuple[float, float] | None = None
    chosen = None
    for job in state.training.jobs.values():
        head = job.head()
        if head is None or state.residency.slot(job.adapter) is None:
            continue
        tenant = head.spec.tenant
        rank = (state.shares.tag_after(tenant, admitted_s[tenant]), head.waiting_since_s)
        if best is None or rank < best:
            best, chosen = rank, head
    return chosen


def _admit_packs(state: SchedulerState, draft: PlanDraft) -> None:
    limits = state.limits
    while (pack := _next_pack(state)) is not None:
        is_aged = draft.now_s - pack.waiting_since_s >= limits.max_training_wait_s
        if draft.is_short_of_blocks and not is_aged:
            return
        if state.training.alive_tokens + pack.spec.num_tokens > limits.max_train_tokens:
            return
        needed = limits.num_blocks_for(pack.spec.num_tokens)
        if not is_aged:
            needed += limits.inference_reserve_blocks
        if state.blocks.num_free < needed:
            return
        state.admit_pack(pack)
        pack.is_protected = is_aged


def _add_steps(state: SchedulerState, draft: PlanDraft, budget_s: float) -> None:
    for job in _due_jobs(state):
        if not draft.try_add_step(job, _slot(state, job), budget_s):
            return


def _add_windows(
    state: SchedulerState,
    draft: PlanDraft,
    budget_s: float,
    is_in_turn: Callable[[Pack], bool],
    dearest: float,
) -> None:
    """As many tokens of forward passes as fit, the oldest pack first; those of one pack are one window. None
    whose tokens take more than `dearest` times what they take alone.
    """
    for pack in filter(is_in_turn, state.training.alive):
        if pack.status is PackStatus.FORWARDING:
            rest = pack.spec.num_tokens - pack.num_forwarded
            is_added = _add_window(state, draft, pack, budget_s, rest, dearest)
            if not is_added or pack.status is PackStatus.FORWARDING:
                return


def _add_slices(
    state: SchedulerState, draft: PlanDraft, budget_s: float, is_in_turn: Callable[[Pack], bool]
) -> None:
    """Slices of the wave, and of the next one. That is not begun while a job is at its optimizer step: with
    the packs that then come it would be wider, so that jobs which are out of phase fall into step.
    """
    stops = draft.stops_between_layers or draft.must_finish_layer
    while state.training.wave is not None or not _step_is_in_flight(state):
        wave = state.training.next_wave(is_in_turn)
        if wave is None or (stops and wave.is_between_layers) or not _add_slice(state, draft, wave, budget_s):
            return


def _step_is_in_flight(state: SchedulerState) -> bool:
    return any(job.step_is_planned for job in state.training.jobs.values())


def _force_one(state: SchedulerState, draft: PlanDraft) -> None:
    """One unit without a budget: an optimizer step, else a slice, else a window."""
    for job in _due_jobs(state):
        draft.try_add_step(job, _slot(state, job), inf)
        return
    wave = state.training.next_wave()
    if wave is not None:
        _add_slice(state, draft, wave, inf)
        return
    for pack in state.training.alive:
        num_tokens = state.training.most_forward(pack)
        if pack.status is PackStatus.FORWARDING and _add_window(state, draft, pack, inf, num_tokens):
            return


def _add_window(
    state: SchedulerState,
    draft: PlanDraft,
    pack: Pack,
    budget_s: float,
    num_tokens: int,
    dearest: float = inf,
) -> bool:
    slot = _slot(state, state.training.jobs[pack.spec.job_id])
    return draft.try_add_window(state.training, pack, slot, budget_s, num_tokens, dearest)


def _add_slice(state: SchedulerState, draft: PlanDraft, wave: Wave, budget_s: float) -> bool:
    num_done = len(draft.done)
    jobs = state.training.jobs
    slots = tuple([_slot(state, jobs[pack.spec.job_id]) for pack in wave.members()])
    is_added = draft.try_add_slice(state.training, wave, slots, budget_s)
    for pack in draft.done[num_done:]:
        state.blocks.free(pack.block_ids, draft.iteration)
        draft.freed[pack] = pack.block_ids
        pack.block_ids = ()
    return is_added


def _slot(state: SchedulerState, job: Job) -> int:
    """The slot of a job's adapter; it stays on the device from its first pack until the job is removed.

    Raises:
        RuntimeError: it is not on the device.
    """
    slot = state.residency.slot(job.adapter)
    if slot is None:
        raise RuntimeError(f"training adapter {job.adapter} is not on the device")
    return slot
