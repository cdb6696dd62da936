"""Decodes and prompts: who runs, who is admitted, and what gives way when KV blocks run out.

Every running sequence decodes in every plan; prompts fill what the budget leaves. When blocks run out,
training packs are dropped first, then the youngest running sequence of the lowest priority is preempted. The
oldest is never preempted while another runs, so that something always finishes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from heapq import heapify, heappop, heapreplace

from weft_scheduler.cost import PlanFeatures
from weft_scheduler.draft import PlanDraft
from weft_scheduler.requests import Sequence, SequenceStatus
from weft_scheduler.state import SchedulerState

MIN_PREFILL_TOKENS = 64
"""Prompt tokens that every plan takes, whatever the budget."""


def plan_decodes(state: SchedulerState, draft: PlanDraft) -> None:
    """One token of every running sequence whose prompt is computed; each is charged to its tenant."""
    capacity = state.limits.block_size
    running = state.running
    num_tokens: Counter[str] = Counter()
    idx = 0
    while idx < len(running):
        sequence = running[idx]
        if sequence.is_prefilling or sequence.num_planned >= sequence.max_new_tokens:
            idx += 1
            continue
        if sequence.num_computed == len(sequence.block_ids) * capacity:
            if not _find_block(state, draft, sequence):
                idx += sequence.status is SequenceStatus.RUNNING
                continue
            sequence.block_ids.extend(state.blocks.allocate(1))
        draft.add_decode(sequence)
        num_tokens[sequence.spec.tenant] += 1
        idx += 1
    if num_tokens:
        price_s = state.cost.predict(PlanFeatures(forward_tokens=1, num_sequences=1))
        for tenant, count in num_tokens.items():
            state.inference_shares.charge(tenant, price_s * count)


def plan_prefills(
    state: SchedulerState, draft: PlanDraft, budget_s: float, num_kept_tokens: int, num_kept_blocks: int
) -> None:
    """Chunks of running prompts, then of newly admitted ones, within the budget.

    `num_kept_tokens` rows of the batch and, for new admissions, `num_kept_blocks` free blocks are left alone.
    """
    for sequence in state.running:
        if sequence.is_prefilling and not _add_chunk(draft, sequence, budget_s, num_kept_tokens):
            return
    for sequence in _admissions(state, draft, budget_s, num_kept_tokens, num_kept_blocks):
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
    state: SchedulerState, draft: PlanDraft, budget_s: float, num_kept_tokens: int, num_kept_blocks: int
) -> Iterator[Sequence]:
    """Admit waiting sequences one by one: the least served tenant's first whose adapter is on the device.

    Stops at the first that finds no blocks, so that small requests do not overtake a large one for ever.
    """
    shares = state.inference_shares
    heap = [(shares.tag(tenant), tenant) for tenant in state.waiting.tenants]
    heapify(heap)
    while heap and len(state.running) < state.limits.max_num_seqs:
        has_time = draft.num_prefill_tokens < MIN_PREFILL_TOKENS or draft.predicted_s < budget_s
        if not has_time or draft.tokens_left <= num_kept_tokens:
            return
        tenant = heap[0][1]
        heads = state.waiting.heads_among(tenant, state.residency.extents)
        sequence = next((seq for seq in heads if _is_admissible(state, seq)), None)
        if sequence is None:
            heappop(heap)
            continue
        if not _find_prompt_blocks(state, draft, sequence, num_kept_blocks):
            return
        state.admit(sequence)
        heapreplace(heap, (shares.tag(tenant), tenant))
        yield sequence


def _is_admissible(state: SchedulerState, sequence: Sequence) -> bool:
    adapter = sequence.spec.adapter
    if sequence.last_planned > state.committed:
        return False
    return adapter is None or state.residency.is_admitting(adapter)


def _find_prompt_blocks(
    state: SchedulerState, draft: PlanDraft, sequence: Sequence, num_kept_blocks: int
) -> bool:
    """Whether blocks for all tokens of a sequence are free, and one to grow for each that runs; may drop
    packs.
    """
    blocks = state.blocks
    needed = state.limits.num_blocks_for(sequence.num_tokens) + len(state.running)
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
            return False
        soon += len(pack.block_ids)
        state.drop_pack(pack, draft)
    return blocks.num_free >= needed


def _find_block(state: SchedulerState, draft: PlanDraft, sequence: Sequence) -> bool:
    """Whether a block is free for a decode, taking it from packs and then from younger sequences.

    False: the sequence sits this plan out (a block is about to be free), or has been preempted itself.

    Raises:
        MemoryError: it holds every block and wants more, which `add_request` rules out.
    """
    blocks = state.blocks
    while not blocks.num_free:
        draft.is_short_of_blocks = True
        if blocks.num_pending > draft.num_claimed_blocks:
            draft.num_claimed_blocks += 1
            return False
        is_alone = len(state.running) == 1
        is_dropped = _try_drop_pack(state, draft, spare_protected=not is_alone)
        if is_dropped is None:
            return False
        if is_dropped:
            continue
        if is_alone:
            raise MemoryError(f"sequence {sequence.spec.sequence_id} needs more than all KV blocks")
        victim = state.running[-1]
        state.preempt(victim, draft)
        if victim is sequence:
            return False
    return True


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
