"""Decodes and prompts: who runs, who is admitted, and what gives way when room runs out.

Every running sequence decodes in every plan; prompts fill what the budget leaves. Tenants are admitted in the
order of their shares, and a tenant that is ahead of another tenant's finetuning waits for it: inference goes
before finetuning only inside its tenant's share.

When blocks run out, training packs are dropped first, then running sequences are preempted: flex ones first,
of the tenant that holds the most blocks for its weight, the last in its own order. A request that has waited
too long for a place takes one from a tenant that has more places for its weight. The first sequence of all is
never preempted while another runs, so that something always finishes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heapreplace
from itertools import chain
from math import inf

from weft_scheduler.draft import PlanDraft
from weft_scheduler.requests import Sequence
from weft_scheduler.state import SchedulerState
from weft_scheduler.training_policy import lead_limit, runnable_tenants

MIN_PREFILL_TOKENS = 64
"""Prompt tokens that every plan takes, whatever the budget."""

_LEAST_LEAD_S = 0.05
"""How far a tenant whose prompt is being computed must be ahead for another one's to begin before it."""

LAYER_PATIENCE_S = 0.5
"""How long a request that needs the blocks of a wave waits for it to end its layer within the budgets."""


def make_room_for_the_overdue(state: SchedulerState, draft: PlanDraft) -> None:
    """Preempt one sequence if all places are taken and somebody has waited too long for a fair part of them.

    First of all a default request takes the place of its own tenant's last flex sequence. Else the tenant
    whose first request waits longest gets a place of the tenant that has most places for its weight,
    provided that it has no more for its own weight once the place has changed hands, and that it is next in
    turn: a place that its former owner or nobody would get is not worth a preemption.
    """
    if _take_place_of_own_flex(state, draft) or len(state.running) < state.limits.max_num_seqs:
        return
    places = state.num_running
    overdue = [
        (head.waiting_since_s, tenant)
        for tenant in state.waiting.tenants
        if (head := _head(state, tenant)) is not None
        and draft.now_s - head.waiting_since_s >= state.limits.max_wait_s
    ]
    if not overdue:
        return
    tag, weight, limit = state.shares.tag, state.shares.weight, _lead_limit(state, draft.iteration)
    donor = max(places, key=lambda t: places[t] / weight(t))
    for _, tenant in sorted(overdue):
        if tag(tenant) > min(tag(donor), limit(tenant)):
            continue
        if (places[tenant] + 1) / weight(tenant) <= (places[donor] - 1) / weight(donor):
            own = [seq for seq in state.by_precedence()[1:] if seq.spec.tenant == donor]
            state.preempt(own[-1], draft)
            return


def _take_place_of_own_flex(state: SchedulerState, draft: PlanDraft) -> bool:
    """Preempt the last flex sequence of a tenant whose default request has waited too long for a place: of
    all, if it is next in turn, or of those that its concurrency allows.
    """
    running = state.by_precedence()[1:]
    flex = {seq.spec.tenant: seq for seq in running if seq.is_flex and not seq.has_aged}
    waiting = flex.keys() & set(state.waiting.tenants)
    if not waiting:
        return False
    is_full = len(state.running) >= state.limits.max_num_seqs
    tag, limit = state.shares.tag, _lead_limit(state, draft.iteration)
    first_tag = min(map(tag, state.waiting.tenants))
    for tenant in sorted(waiting, key=tag):
        lacks_place = tag(tenant) <= first_tag if is_full else state.is_at_its_concurrency(tenant)
        if not lacks_place or tag(tenant) > limit(tenant):
            continue
        head = _first_admissible(state, tenant)
        if head is None or head.is_flex:
            continue
        if draft.now_s - head.waiting_since_s >= state.limits.max_wait_s:
            state.preempt(flex[tenant], draft)
            return True
    return False


def _head(state: SchedulerState, tenant: str) -> Sequence | None:
    """The first waiting request of a tenant that could start if there were a place."""
    return None if state.is_at_its_concurrency(tenant) else _first_admissible(state, tenant)


def _first_admissible(state: SchedulerState, tenant: str) -> Sequence | None:
    """The first waiting request of a tenant whose adapter is there, whatever its concurrency."""
    heads = state.waiting.heads_among(tenant, state.residency.extents)
    return next((seq for seq in heads if _is_admissible(state, seq)), None)


def plan_decodes(state: SchedulerState, draft: PlanDraft) -> None:
    """One token of every running sequence whose prompt is computed."""
    capacity = state.limits.block_size
    running = state.by_precedence()
    _make_room_for_decodes(state, draft, running)
    for sequence in running:
        if sequence.is_prefilling or sequence.num_planned >= sequence.max_new_tokens:
            continue
        if sequence.num_computed == len(sequence.block_ids) * capacity:
            taken = state.blocks.try_allocate(1)
            if taken is None:
                continue
            sequence.block_ids.extend(taken)
        draft.add_decode(sequence)


def plan_prefills(
    state: SchedulerState,
    draft: PlanDraft,
    budget_s: float,
    num_kept_tokens: int = 0,
    num_kept_blocks: int = 0,
    *,
    yields: bool = True,
) -> None:
    """Chunks of running prompts, those of the least served tenants first, then of newly admitted ones, within
    the budget. A tenant that is behind all whose prompts are being computed is admitted before them: a long
    prompt does not keep the others out.

    `num_kept_tokens` rows of the batch and, for new admissions, `num_kept_blocks` free blocks are left alone.
    With `yields`, tenants that are ahead of the finetuning of others admit nothing.
    """
    limit = _lead_limit(state, draft.iteration) if yields else lambda _tenant: inf
    tag = state.shares.tag
    running = [seq for seq in state.by_precedence() if seq.is_prefilling]
    running.sort(key=lambda seq: tag(seq.spec.tenant))
    if running:
        first = tag(running[0].spec.tenant)
        before = _admissions(
            state,
            draft,
            budget_s,
            lambda t: min(limit(t), first - _LEAST_LEAD_S),
            num_kept_tokens,
            num_kept_blocks,
        )
        for sequence in before:
            if not _add_chunk(draft, sequence, budget_s, num_kept_tokens):
                return
    for sequence in running:
        if not _add_chunk(draft, sequence, budget_s, num_kept_tokens):
            return
    for sequence in _admissions(state, draft, budget_s, limit, num_kept_tokens, num_kept_blocks):
        if not _add_chunk(draft, sequence, budget_s, num_kept_tokens):
            return


def _add_chunk(draft: PlanDraft, sequence: Sequence, budget_s: float, num_kept_tokens: int) -> bool:
    """Plan the next chunk; returns whether the prompt is complete, so that another may follow."""
    missing = sequence.prefill_target - sequence.num_computed
    most = min(missing, draft.tokens_left - num_kept_tokens)
    if most <= 0:
        return False
    num_tokens = draft.prefill_tokens_within(sequence, most, budget_s)
    num_tokens = max(num_tokens, min(most, MIN_PREFILL_TOKENS - draft.num_prefill_tokens))
    if num_tokens <= 0:
        return False
    draft.add_prefill(sequence, num_tokens)
    return num_tokens == missing


def _admissions(
    state: SchedulerState,
    draft: PlanDraft,
    budget_s: float,
    limit: Callable[[str], float],
    num_kept_tokens: int,
    num_kept_blocks: int,
) -> Iterator[Sequence]:
    """Admit waiting sequences one by one: the least served tenant's first whose adapter is on the device.

    What a tenant has admitted and not yet computed counts as served. Stops at the first that finds no blocks,
    so that small requests do not overtake a large one for ever.
    """
    if not state.waiting or len(state.running) >= state.limits.max_num_seqs:
        return
    admitted_s = _admitted_price_s(state)
    heap = [(state.shares.tag_after(tenant, admitted_s[tenant]), tenant) for tenant in state.waiting.tenants]
    heapify(heap)
    while heap and len(state.running) < state.limits.max_num_seqs:
        has_time = draft.num_prefill_tokens < MIN_PREFILL_TOKENS or draft.predicted_s < budget_s
        if not has_time or draft.tokens_left <= num_kept_tokens:
            return
        tag, tenant = heap[0]
        sequence = None if tag > limit(tenant) else _next_of(state, tenant, draft.now_s)
        if sequence is None:
            heappop(heap)
            continue
        if not _find_prompt_blocks(state, draft, sequence, num_kept_blocks):
            return
        state.admit(sequence)
        admitted_s[tenant] += state.prompt_price_s(sequence.prefill_target, sequence.num_computed)
        heapreplace(heap, (state.shares.tag_after(tenant, admitted_s[tenant]), tenant))
        yield sequence


def _admitted_price_s(state: SchedulerState) -> defaultdict[str, float]:
    """By tenant, the price of the prompt tokens that are admitted and not computed."""
    prices: defaultdict[str, float] = defaultdict(float)
    for sequence in state.running:
        if sequence.is_prefilling:
            prices[sequence.spec.tenant] += state.prompt_price_s(
                sequence.prefill_target, sequence.num_computed
            )
    return prices


def _lead_limit(state: SchedulerState, iteration: int) -> Callable[[str], float]:
    """By tenant, the tag beyond which its requests must wait for the finetuning of others that could run."""
    return lead_limit(state, runnable_tenants(state, iteration))


def _next_of(state: SchedulerState, tenant: str, now_s: float) -> Sequence | None:
    """The tenant's next sequence that can start and need not wait for what a running one is computing.

    Overdue flex ones come in their turn. Those that must wait are set apart, so that siblings share a
    prompt's blocks instead of computing it once each.
    """
    if state.is_at_its_concurrency(tenant):
        return None
    passed: set[Sequence] = set()
    while True:
        overdue = state.waiting.overdue_flex(tenant, now_s - state.limits.max_flex_wait_s)
        heads = state.waiting.heads_among(tenant, state.residency.extents)
        for sequence in chain(overdue, heads):
            if sequence in passed or not _is_admissible(state, sequence):
                continue
            awaited = state.awaited_contents(sequence)
            if awaited is None:
                sequence.has_aged = sequence in overdue
                return sequence
            passed.add(sequence)
            if awaited != sequence.awaited:
                state.waiting.set_apart(sequence, awaited)
                break
        else:
            return None


def _is_admissible(state: SchedulerState, sequence: Sequence) -> bool:
    adapter = sequence.spec.adapter
    if sequence.last_planned > state.committed:
        return False
    return adapter is None or state.residency.is_admitting(adapter)


def _find_prompt_blocks(
    state: SchedulerState, draft: PlanDraft, sequence: Sequence, num_kept_blocks: int
) -> bool:
    """Whether the blocks that a sequence cannot share are free, and one to grow for each that runs; may drop
    packs.
    """
    blocks = state.blocks
    needed = state.num_blocks_to_find(sequence) + len(state.running)
    if blocks.num_free >= needed + num_kept_blocks:
        return True
    draft.is_short_of_blocks = True
    if num_kept_blocks:
        return False
    soon = blocks.num_free + blocks.num_pending - draft.num_claimed_blocks
    packs = [pack for pack in state.training.drop_candidates() if not pack.is_protected]
    if soon + sum(len(pack.block_ids) for pack in packs) < needed:
        return False
    for pack in packs:
        if soon >= needed:
            break
        if not state.training.can_drop(pack):
            draft.stops_between_layers = True
            if draft.now_s - sequence.waiting_since_s >= LAYER_PATIENCE_S:
                draft.must_finish_layer = True
            return False
        soon += len(pack.block_ids)
        state.drop_pack(pack, draft)
    return blocks.num_free >= needed


def _make_room_for_decodes(state: SchedulerState, draft: PlanDraft, running: list[Sequence]) -> None:
    """Free a block for every decode that needs one: of packs, then of sequences, which leave `running`.

    Where blocks are about to be free, the last of those that need one sit this plan out.

    Raises:
        MemoryError: a sequence holds every block and wants more, which `add_request` rules out.
    """
    blocks = state.blocks
    if blocks.num_free >= len(running):
        return
    while (missing := sum(_needs_block(state, seq) for seq in running) - blocks.num_free) > 0:
        draft.is_short_of_blocks = True
        if blocks.num_pending >= missing:
            draft.num_claimed_blocks = missing
            return
        is_alone = len(running) == 1
        is_dropped = _try_drop_pack(state, draft, spare_protected=not is_alone)
        if is_dropped is None:
            return
        if is_dropped:
            continue
        if is_alone:
            raise MemoryError(f"sequence {running[0].spec.sequence_id} needs more than all KV blocks")
        victim = _victim(state, running)
        state.preempt(victim, draft)
        running.remove(victim)


def _needs_block(state: SchedulerState, sequence: Sequence) -> bool:
    """Whether the sequence decodes in this plan and its blocks are full."""
    is_full = sequence.num_computed == len(sequence.block_ids) * state.limits.block_size
    return is_full and sequence.num_planned < sequence.max_new_tokens


def _victim(state: SchedulerState, running: list[Sequence]) -> Sequence:
    """Who gives way: of the tenant that holds the most blocks for its weight, the last; flex ones before all.

    `running` is in the order of precedence; the first is spared.
    """
    others = running[1:]
    candidates = [seq for seq in others if seq.is_flex and not seq.has_aged] or others
    held: Counter[str] = Counter()
    for sequence in candidates:
        held[sequence.spec.tenant] += len(sequence.block_ids)
    tenant = max(held, key=lambda t: held[t] / state.shares.weight(t))
    return next(seq for seq in reversed(candidates) if seq.spec.tenant == tenant)


def _try_drop_pack(state: SchedulerState, draft: PlanDraft, *, spare_protected: bool) -> bool | None:
    """Drop the pack whose loss costs least; False if there is none, None if a wave must finish its layer
    first.
    """
    for pack in state.training.drop_candidates():
        if spare_protected and pack.is_protected:
            continue
        if state.training.can_drop(pack):
            state.drop_pack(pack, draft)
            return True
        draft.must_finish_layer = True
        return None
    return False
