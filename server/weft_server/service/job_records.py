"""A finetune job as a stored value, and its events.

Owns the record kinds `job` and `active_job` (the index of unfinished jobs), the event stream of a job and
the names under which a job keeps blobs. Pure values: reading and writing them is the callers' business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from weft_server.protocol import AdapterRef, JobProgress, JobSpec, LoraSpec
from weft_server.service.hyperparameters import (
    HyperparameterRequest,
    lora_from_value,
    spec_from_value,
    spec_to_value,
)
from weft_server.service.leases import Lease
from weft_server.store.base import Append, Record

JOB_KIND = "job"
ACTIVE_JOB_KIND = "active_job"

JobStatus: TypeAlias = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
FINAL_STATUSES: frozenset[JobStatus] = frozenset({"succeeded", "failed", "cancelled"})
BlobRole: TypeAlias = Literal["training", "dataset", "checkpoint", "base"]
EventLevel: TypeAlias = Literal["info", "warn", "error"]


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast the current run goes: the first step seen of it and the latest (times: store's clock)."""

    first_step: int
    first_at: float
    last_step: int
    last_at: float

    def seconds_for(self, num_steps: int) -> float | None:
        """Predicted time for so many more steps; None before two steps were seen."""
        seen = self.last_step - self.first_step
        return None if seen <= 0 else num_steps * (self.last_at - self.first_at) / seen


@dataclass(frozen=True, slots=True)
class Job:
    """One finetune job. Times in seconds since the epoch; steps are optimizer steps.

    `training_blob` is kept until the file is tokenized, `dataset_blob` from then on. `adapter_name` is the
    name that the trained adapter will be published under. `step` is the last step that events tell of,
    `checkpoint_step` the one that the job would continue from.
    """

    id: str
    tenant: str
    status: JobStatus
    created_at: int
    model: str
    training_file: str
    adapter_name: str
    suffix: str | None
    metadata: Mapping[str, str] | None
    hyperparameters: HyperparameterRequest
    seed: int
    lora: LoraSpec
    max_seq_length: int
    base_fingerprint: str
    base_adapter: AdapterRef | None = None
    training_blob: str | None = None
    dataset_blob: str | None = None
    spec: JobSpec | None = None
    checkpoint_blob: str | None = None
    checkpoint_step: int = 0
    step: int = 0
    pace: Pace | None = None
    trained_tokens: int | None = None
    finished_at: int | None = None
    error: JobError | None = None
    fine_tuned_model: str | None = None
    lease: Lease | None = None

    @property
    def is_final(self) -> bool:
        """Whether the job will never change again."""
        return self.status in FINAL_STATUSES

    def estimated_finish(self) -> int | None:
        """When the job should be done, seconds since the epoch; None unless it runs and its pace is known."""
        if self.status != "running" or self.spec is None or self.pace is None:
            return None
        seconds = self.pace.seconds_for(self.spec.total_steps - self.pace.last_step)
        return None if seconds is None else math.ceil(self.pace.last_at + seconds)

    def to_value(self) -> dict[str, Any]:
        """As stored in the record, which holds tenant and id beside it."""
        value = asdict(self)
        del value["id"], value["tenant"]
        if self.spec is not None:
            value["spec"] = spec_to_value(self.spec)
        return value

    @classmethod
    def from_record(cls, record: Record) -> Job:
        """From the record."""
        value = dict(record.value)
        value["hyperparameters"] = HyperparameterRequest.from_value(value["hyperparameters"])
        value["lora"] = lora_from_value(value["lora"])
        value["lease"] = Lease.from_value(value["lease"])
        for key, read in (
            ("base_adapter", AdapterRef),
            ("pace", Pace),
            ("error", JobError),
        ):
            value[key] = None if value[key] is None else read(**value[key])
        value["spec"] = None if value["spec"] is None else spec_from_value(value["spec"])
        return cls(id=record.id, tenant=record.tenant, **value)


def blob_owner(job: Job, role: BlobRole) -> str:
    """The name under which a job keeps a blob."""
    return f"job:{job.tenant}:{job.id}:{role}"


def event_stream(tenant: str, job_id: str) -> str:
    """The stream of a job's events."""
    return f"job:{tenant}:{job_id}"


def message_event(job: Job, message: str, *, now: float, level: EventLevel = "info") -> Append:
    """An event that says something."""
    return _event(job, message, now=now, level=level, kind="message", data={})


def metrics_event(job: Job, progress: JobProgress, *, now: float) -> Append:
    """An event with one step's numbers."""
    data = {
        "step": progress.step,
        "train_loss": _finite(progress.train_loss),
        "train_mean_token_accuracy": _finite(progress.train_mean_token_accuracy),
        "learning_rate": progress.learning_rate,
        "grad_norm": _finite(progress.grad_norm),
        "tokens_per_second": _finite(progress.tokens_per_second),
    }
    return _event(job, _step_text(progress), now=now, level="info", kind="metrics", data=data)


def step_event(job: Job, progress: JobProgress, *, now: float) -> Append:
    """The same step in words."""
    return message_event(job, _step_text(progress), now=now)


def _step_text(progress: JobProgress) -> str:
    return f"Step {progress.step}/{progress.total_steps}: training loss={progress.train_loss:.4f}"


def _event(
    job: Job, message: str, *, now: float, level: EventLevel, kind: str, data: dict[str, Any]
) -> Append:
    value = {"created_at": int(now), "level": level, "message": message, "type": kind, "data": data}
    return Append(event_stream(job.tenant, job.id), value)


def _finite(value: float) -> float | None:
    """JSON has no NaN or infinity."""
    return value if math.isfinite(value) else None
