"""A finetune job in the engine: its data order, its adapter's training state, and its optimizer steps.

A step is a set of examples fixed before any packing. The job makes the step's packs, the engine runs them,
and `finish_step` updates the adapter once every pack's gradient has been added.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from weft_server.adapters.packed import PackedAdapter
from weft_server.protocol import JobSpec
from weft_server.training.data import Dataset, Example, examples_of_step
from weft_server.training.optimizer import FlatAdamW, NonFiniteGradient
from weft_server.training.pack import Pack, make_pack, plan_packs


class JobError(Exception):
    """The job cannot go on; it fails alone. `code` is stable, the message names step and example."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did. `loss` is the mean over the step's target tokens."""

    step: int
    loss: float
    token_accuracy: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float


class FinetuneJob:
    """Training state of one job. Not thread-safe: the engine loop owns it.

    `adapter` is the packed fp32 adapter that training starts from; its flat weights become the optimizer's
    master.
    """

    def __init__(
        self,
        job_id: str,
        tenant: str,
        spec: JobSpec,
        dataset: Dataset,
        adapter: PackedAdapter,
        *,
        lease_epoch: int,
        device: torch.device,
        max_pack_tokens: int,
        dtype: torch.dtype = torch.float32,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job_id = job_id
        self.tenant = tenant
        self.spec = spec
        self.lease_epoch = lease_epoch
        self.adapter = adapter
        self.num_steps_done = 0
        self.trained_tokens = 0
        self.optimizer = FlatAdamW(adapter.weights.to(device=device, dtype=dtype, copy=True), spec)
        self._dataset = dataset
        self._device = device
        self._max_pack_tokens = max_pack_tokens
        self._clock = clock
        self._packs: list[Pack] = []
        self._step_started = clock()

    @property
    def adapter_key(self) -> str:
        """The scheduler's name for the adapter in training (published versions have digests instead)."""
        return f"job:{self.job_id}"

    @property
    def is_finished(self) -> bool:
        """True when all steps are done."""
        return self.num_steps_done >= self.spec.total_steps

    def start_step(self) -> Sequence[Pack]:
        """The packs of the next step; all of them must be run before `finish_step`."""
        step, spec = self.num_steps_done, self.spec
        examples: list[Example] = [
            self._dataset[idx]
            for idx in examples_of_step(len(self._dataset), spec.batch_size, spec.seed, step)
        ]
        self._packs = [
            make_pack(
                f"{self.job_id}/{step}/{pack_idx}",
                self.job_id,
                [examples[i] for i in members],
                device=self._device,
                dropout_p=spec.lora.dropout,
                seed=spec.seed,
                step=step,
            )
            for pack_idx, members in enumerate(
                plan_packs([len(e.tokens) for e in examples], self._max_pack_tokens)
            )
        ]
        self._step_started = self._clock()
        return self._packs

    def finish_step(self) -> StepReport:
        """Check the step's losses, update the adapter, and report.

        Raises:
            JobError: a loss or the gradient is NaN or infinite; the adapter is as it was after the previous
            step.
        """
        loss = self._summed_loss()
        num_targets = sum(pack.num_targets for pack in self._packs)
        num_tokens = sum(pack.num_tokens for pack in self._packs)
        correct = sum(int(pack.correct.sum()) for pack in self._packs if pack.correct is not None)
        try:
            update = self.optimizer.step(self.num_steps_done, num_targets)
        except NonFiniteGradient as error:
            raise JobError(
                "non_finite_gradient",
                f"{error} at step {self.num_steps_done + 1}; lower the learning rate or inspect the step's "
                f"examples (lines {_lines(self._packs)})",
            ) from error
        self.num_steps_done += 1
        self.trained_tokens += num_tokens
        self._packs = []
        return StepReport(
            step=self.num_steps_done,
            loss=loss / max(1, num_targets),
            token_accuracy=correct / max(1, num_targets),
            learning_rate=update.learning_rate,
            grad_norm=update.grad_norm,
            tokens_per_second=num_tokens / max(1e-9, self._clock() - self._step_started),
        )

    def _summed_loss(self) -> float:
        total = 0.0
        for pack in self._packs:
            for line, loss in zip(pack.lines, pack.loss_by_example(), strict=True):
                if not abs(loss) < float("inf"):
                    raise JobError(
                        "non_finite_loss",
                        f"loss is {loss} at step {self.num_steps_done + 1}, example on line {line}; "
                        f"lower the learning rate or inspect the example",
                    )
                total += loss
        return total


def _lines(packs: Sequence[Pack]) -> str:
    return ", ".join(str(line) for pack in packs for line in pack.lines)
