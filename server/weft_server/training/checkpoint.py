"""Job checkpoints: everything that a resumed job needs to continue exactly, as one safetensors blob.

Data order and dropout are pure functions of (seed, step), so the step number is the whole data cursor and
random state.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import safetensors
import safetensors.torch
from torch import Tensor

from weft_server.training.job import FinetuneJob

_FORMAT = "weft-job-checkpoint-1"


class CheckpointError(Exception):
    """The blob is not a checkpoint of this job."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A snapshot on the CPU: the optimizer's vectors after `step` optimizer steps."""

    job_id: str
    step: int
    trained_tokens: int
    tensors: dict[str, Tensor]

    def to_bytes(self) -> bytes:
        """Serialize; may run in another thread than the one that took the snapshot."""
        metadata = {
            "format": _FORMAT,
            "state": json.dumps(
                {"job_id": self.job_id, "step": self.step, "trained_tokens": self.trained_tokens}
            ),
        }
        return bytes(safetensors.torch.save(self.tensors, metadata=metadata))


def take_checkpoint(job: FinetuneJob) -> Checkpoint:
    """Copy a job's state between two optimizer steps."""
    return Checkpoint(job.job_id, job.num_steps_done, job.trained_tokens, job.optimizer.state())


def restore_checkpoint(job: FinetuneJob, blob: bytes) -> None:
    """Continue a job from a checkpoint; in host memory, before the job has its place on the device.

    Raises:
        CheckpointError: not a checkpoint, or one of another job or adapter shape.
    """
    try:
        header_bytes = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + header_bytes])["__metadata__"]
        if header["format"] != _FORMAT:
            raise CheckpointError(f"checkpoint format {header['format']!r} is not {_FORMAT!r}")
        state = json.loads(header["state"])
        tensors = safetensors.torch.load(blob)
        master = tensors["master"]
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"the checkpoint cannot be read: {error}") from error
    if state["job_id"] != job.job_id or master.shape != job.adapter.weights.shape:
        raise CheckpointError(
            f"the checkpoint is of job {state['job_id']} with {master.numel()} parameters, "
            f"not of {job.job_id} with {job.adapter.weights.numel()}"
        )
    job.restore(tensors, state["step"], state["trained_tokens"])
