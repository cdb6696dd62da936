"""What happens to a job, as pure functions: the next value of it and the store changes that go with it.

Every function returns an `Update` of the job (or None: nothing to do) whose changes are applied together
with the job's record in one atomic step. Owns the state machine

    validating_files → queued → running → succeeded | failed | cancelled

and which blobs a job keeps in which state. Knows nothing of the engine, threads or clocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from weft_server.errors import InvalidRequest
from weft_server.protocol import (
    JobCheckpointed,
    JobFailed,
    JobProgress,
    JobSpec,
    JobStopped,
    JobSucceeded,
)
from weft_server.service.adapter_versions import AdapterVersion, publication
from weft_server.service.datasets import TokenizedDataset
from weft_server.service.engine_port import JobMessage
from weft_server.service.job_records import (
    BlobRole,
    Job,
    JobError,
    Pace,
    blob_owner,
    message_event,
    metrics_event,
    step_event,
)
from weft_server.store.base import Change, Link, Record, Unlink

JobNews: TypeAlias = list[JobProgress] | JobCheckpointed | JobSucceeded | JobFailed | JobStopped
"""What is written at once."""


@dataclass(frozen=True, slots=True)
class JobUpdate:
    """The job as it is to be, and what else changes with it."""

    job: Job
    changes: tuple[Change, ...] = ()


def merged(messages: Sequence[JobMessage]) -> list[JobNews]:
    """The engine's messages in order, successive steps as one: they piled up while the last write ran."""
    news: list[JobNews] = []
    for message in messages:
        if not isinstance(message, JobProgress):
            news.append(message)
        elif news and isinstance(news[-1], list):
            news[-1].append(message)
        else:
            news.append([message])
    return news


def tokenized(job: Job, dataset: TokenizedDataset, spec: JobSpec, *, now: float) -> JobUpdate | None:
    """The training file is valid: the job keeps the dataset instead of the file, and is queued."""
    if job.status != "validating_files":
        return None
    queued = replace(
        job, status="queued", dataset_blob=dataset.blob, training_blob=None, spec=spec, seed=spec.seed
    )
    changes: list[Change] = [Link(dataset.blob, blob_owner(job, "dataset"))]
    if job.training_blob is not None:
        changes.append(Unlink(job.training_blob, blob_owner(job, "training")))
    longer = f"examples longer than {job.max_seq_length} tokens were"
    for count, what in (
        (dataset.num_truncated, f"{longer} truncated"),
        (dataset.num_dropped, f"{longer} dropped"),
        (
            dataset.num_without_targets,
            f"examples were left out, because truncation to {job.max_seq_length} tokens left nothing of "
            "their answers to train on",
        ),
    ):
        if count:
            text = f"{count} {what}"
            changes.append(message_event(job, text, now=now, level="warn"))
    text = (
        f"Files validated, moving job to queued state: {dataset.num_examples} examples, {spec.total_steps} "
        f"steps, {dataset.num_tokens} tokens of which {dataset.num_target_tokens} are trained"
    )
    changes.append(message_event(job, text, now=now))
    return JobUpdate(queued, tuple(changes))


def progressed(job: Job, messages: Sequence[JobProgress], *, now: float) -> JobUpdate | None:
    """Steps are done. Steps reported before (a resumed job repeats them) are not reported again."""
    if job.is_final or not messages:
        return None
    changes: list[Change] = []
    if job.status != "running":
        changes.append(message_event(job, "Fine-tuning job started", now=now))
    step = job.step
    for message in messages:
        if message.step > step:
            step = message.step
            changes += (metrics_event(job, message, now=now), step_event(job, message, now=now))
    last = messages[-1].step
    pace = job.pace or Pace(last, now, last, now)
    pace = replace(pace, last_step=last, last_at=now)
    return JobUpdate(replace(job, status="running", step=step, pace=pace), tuple(changes))


def checkpointed(job: Job, message: JobCheckpointed, *, now: float) -> JobUpdate | None:
    """A newer checkpoint is durable; it replaces the last one."""
    if job.is_final or message.blob == job.checkpoint_blob:
        return None
    owner = blob_owner(job, "checkpoint")
    changes: list[Change] = [Link(message.blob, owner)]
    if job.checkpoint_blob is not None:
        changes.append(Unlink(job.checkpoint_blob, owner))
    changes.append(message_event(job, f"Checkpoint saved at step {message.step}", now=now))
    saved = replace(job, checkpoint_blob=message.blob, checkpoint_step=message.step)
    return JobUpdate(saved, tuple(changes))


def succeeded(
    job: Job, message: JobSucceeded, adapter: Record | None, version_number: int, *, now: float
) -> JobUpdate | None:
    """All steps are done: the adapter is published in the same change.

    Args:
        job: the job.
        message: the engine's, naming the durable adapter.
        adapter: the present record of the name to publish under, None if there is none.
        version_number: from the name's counter.
        now: store's clock, seconds.
    """
    if job.is_final:
        return None
    version = AdapterVersion(
        number=version_number,
        ref=message.adapter,
        max_rank=message.max_rank,
        target_modules=tuple(message.target_modules),
        num_parameters=message.num_parameters,
        created_at=int(now),
        base_fingerprint=job.base_fingerprint,
        job_id=job.id,
    )
    changes = publication(adapter, job.tenant, job.adapter_name, version)
    finished = replace(
        job,
        status="succeeded",
        finished_at=int(now),
        trained_tokens=message.trained_tokens,
        fine_tuned_model=job.adapter_name,
    )
    changes += (
        message_event(job, f"New fine-tuned model created: {job.adapter_name}@{version_number}", now=now),
        message_event(job, "The job has successfully completed", now=now),
    )
    return _finished(job, finished, changes)


def failed(job: Job, error: JobError, *, now: float) -> JobUpdate | None:
    """The job failed alone."""
    if job.is_final:
        return None
    changes = [message_event(job, f"The job failed: {error.message}", now=now, level="error")]
    return _finished(job, replace(job, status="failed", finished_at=int(now), error=error), changes)


def cancelled(job: Job, *, now: float) -> JobUpdate:
    """The owner does not want the job any more.

    Raises:
        InvalidRequest: the job is finished already.
    """
    if job.is_final:
        raise InvalidRequest(
            f"The job '{job.id}' has already {_PAST[job.status]}; only an unfinished job can be cancelled.",
            code="job_finished",
        )
    changes = [message_event(job, "The job was cancelled", now=now)]
    return _finished(job, replace(job, status="cancelled", finished_at=int(now)), changes)


def engine_restarted(job: Job, *, is_guilty: bool, now: float) -> JobUpdate | None:
    """The engine died and is back: the job continues under a new epoch, unless it was what killed it."""
    if job.is_final or job.lease is None:
        return None
    if is_guilty:
        error = JobError(
            "engine_crashed",
            "The engine died each time it ran this job, and no other suspect was beside it the last time, so "
            "the job is not tried again.",
        )
        return failed(job, error, now=now)
    lease = replace(job.lease, epoch=job.lease.epoch + 1)
    continued = replace(job, lease=lease, pace=None)
    changes: tuple[Change, ...] = ()
    if job.status == "running":
        text = f"The engine restarted; continuing from step {job.checkpoint_step}"
        changes = (message_event(job, text, now=now, level="warn"),)
    return JobUpdate(continued, changes)


_PAST = {"succeeded": "succeeded", "failed": "failed", "cancelled": "been cancelled"}


def _finished(job: Job, finished: Job, changes: Sequence[Change]) -> JobUpdate:
    """A finished job keeps no blobs."""
    base = job.base_adapter
    kept: tuple[tuple[BlobRole, str | None], ...] = (
        ("training", job.training_blob),
        ("dataset", job.dataset_blob),
        ("checkpoint", job.checkpoint_blob),
        ("base", None if base is None else base.config_blob),
        ("base", None if base is None else base.weights_blob),
    )
    unlinks = [Unlink(blob, blob_owner(job, role)) for role, blob in kept if blob is not None]
    emptied = replace(finished, training_blob=None, dataset_blob=None, checkpoint_blob=None, pace=None)
    return JobUpdate(emptied, (*changes, *unlinks))
