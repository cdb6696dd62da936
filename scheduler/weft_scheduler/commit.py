"""What follows from a plan that has run: tokens, packs and optimizer steps change their states and are told.

Charges, budgets and the cost model are settled elsewhere.
"""

from __future__ import annotations

from weft_scheduler.in_flight import InFlight
from weft_scheduler.outcomes import PackDone, SequenceToken, StepDone, StepResult
from weft_scheduler.requests import Sequence, SequenceStatus
from weft_scheduler.state import SchedulerState
from weft_scheduler.training import PackStatus


def commit_tokens(
    state: SchedulerState, ran: InFlight, result: StepResult, now_s: float
) -> list[SequenceToken]:
    """Name the blocks that have been written, and give every living sequence its token."""
    state.meter_tokens(ran.sampled, now_s)
    for sequence, num_tokens in ran.written:
        if sequence.status is SequenceStatus.RUNNING:
            state.written(sequence, num_tokens)
    living = [sequence for sequence in ran.sampled if not sequence.is_finished]
    return [_commit_token(state, seq, result.sampled[seq.spec.sequence_id]) for seq in living]


def commit_training(state: SchedulerState, ran: InFlight) -> list[PackDone | StepDone]:
    """Packs whose last slice has run, then optimizer steps."""
    training = state.training
    outcomes: list[PackDone | StepDone] = []
    for pack in ran.done:
        if pack.status is not PackStatus.REMOVED:
            training.committed(pack)
            outcomes.append(PackDone(pack.spec.pack_id))
    for job in ran.stepped:
        if training.jobs.get(job.job_id) is job:
            job.step_is_closed = job.step_is_planned = False
            outcomes.append(StepDone(job.job_id))
    return outcomes


def _commit_token(state: SchedulerState, sequence: Sequence, token_id: int) -> SequenceToken:
    sequence.num_generated += 1
    if sequence.chain is not None:
        sequence.chain.append(token_id)
    reason = sequence.finish_reason(token_id)
    if reason is not None:
        state.meter.finish(sequence.spec.tenant, sequence.num_generated)
        state.retire(sequence)
    return SequenceToken(sequence.spec.sequence_id, token_id, reason, sequence.num_cached_tokens)
