"""A finetune job in the engine: its data order, its adapter's training state, and its optimizer steps.

A step is a set of examples fixed before any packing. The job makes the step's packs, the engine runs them,
`issue_update` updates the adapter once every pack's gradient has been added, and `finish_step` reports it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weft_kernels.transfer import download
from weft_server.adapters.packed import PackedAdapter
from weft_server.protocol import JobSpec
from weft_server.training.data import Dataset, Example, ExampleOrder
from weft_server.training.optimizer import FlatAdamW
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


@dataclass(frozen=True, slots=True)
class _IssuedUpdate:
    """`on_host`: summed loss of each example, then gradient norm and number of right tokens, on their way."""

    on_host: Tensor
    learning_rate: float


class FinetuneJob:
    """Training state of one job. Not thread-safe: the engine loop owns it.

    `adapter` is the packed fp32 adapter that training starts from; its flat weights become the optimizer's
    master. Until the adapter has its place on the device (`take_place`) the job is in host memory alone.
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
        self._optimizer: FlatAdamW | None = None
        self._restored: Mapping[str, Tensor] | None = None
        self._dtype = dtype
        self._dataset = dataset
        self._order = ExampleOrder(len(dataset), spec.batch_size, spec.seed)
        self._device = device
        self._max_pack_tokens = max_pack_tokens
        self._clock = clock
        self._packs: list[Pack] = []
        self._update: _IssuedUpdate | None = None
        self._step_started = clock()

    @property
    def adapter_key(self) -> str:
        """The scheduler's name for the adapter in training (published versions have digests instead)."""
        return f"job:{self.job_id}"

    @property
    def has_place(self) -> bool:
        """Whether its state is on the device."""
        return self._optimizer is not None

    @property
    def optimizer(self) -> FlatAdamW:
        """Its state on the device. Raises RuntimeError while it has no place there."""
        if self._optimizer is None:
            raise RuntimeError(f"job {self.job_id} has no place on the device")
        return self._optimizer

    def restore(self, state: Mapping[str, Tensor], num_steps_done: int, trained_tokens: int) -> None:
        """Continue from a state of the optimizer (on the host, as `FlatAdamW.state` gives it) that belongs to
        this step; before `take_place`."""
        self._restored = state
        self.num_steps_done, self.trained_tokens = num_steps_done, trained_tokens

    def weights_on_host(self) -> Tensor:
        """The flat weights after the last step on the CPU, in fp32; not to be written to."""
        if self._optimizer is not None:
            return self._optimizer.master.detach().to("cpu", torch.float32, copy=True)
        weights = self.adapter.weights if self._restored is None else self._restored["master"]
        return weights.to(torch.float32)

    def pin(self) -> None:
        """Move what is on the host to pinned memory, so that `take_place` waits for nothing."""
        self.adapter = replace(self.adapter, weights=self.adapter.weights.pin_memory())
        if self._restored is not None:
            self._restored = {name: tensor.pin_memory() for name, tensor in self._restored.items()}

    def take_place(self) -> None:
        """Allocate the optimizer's state on the device, four vectors, and fill it from the host."""
        weights = self.adapter.weights.to(self._device, self._dtype, non_blocking=True, copy=True)
        self._optimizer = FlatAdamW(weights, self.spec)
        if self._restored is not None:
            self._optimizer.load_state(self._restored)
            self._restored = None

    def give_up_place(self) -> None:
        """Free the state on the device, with what it has learnt."""
        self._optimizer = None

    @property
    def is_finished(self) -> bool:
        """True when all steps are done."""
        return self.num_steps_done >= self.spec.total_steps

    def start_step(self) -> Sequence[Pack]:
        """The packs of the next step; all of them must be run before `issue_update`."""
        step, spec = self.num_steps_done, self.spec
        examples: list[Example] = [self._dataset[idx] for idx in self._order.of_step(step)]
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

    def issue_update(self) -> None:
        """Issue the optimizer step on the gradients of all packs; waits for nothing. `finish_step` reads what
        came of it.

        A loss or gradient that is not finite leaves the adapter as it was after the previous step.
        """
        losses = torch.cat([pack.loss_by_example() for pack in self._packs])
        num_targets = sum(pack.num_targets for pack in self._packs)
        update = self.optimizer.step(self.num_steps_done, num_targets, torch.isfinite(losses).all())
        correct = sum(
            (pack.correct.sum() for pack in self._packs if pack.correct is not None),
            start=torch.zeros((), dtype=torch.int64, device=losses.device),
        )
        scalars = torch.stack((update.grad_norm.to(losses.dtype), correct.to(losses.dtype)))
        self._update = _IssuedUpdate(download(torch.cat((losses, scalars))), update.learning_rate)

    def finish_step(self) -> StepReport:
        """Check the step's losses and gradient, and report; only after the event of the iteration that
        issued the update has passed.

        Raises:
            JobError: a loss or the gradient is NaN or infinite.
            RuntimeError: no update was issued.
        """
        if self._update is None:
            raise RuntimeError(f"job {self.job_id} has issued no update")
        update, self._update = self._update, None
        *losses, grad_norm, correct = update.on_host.tolist()
        self._check(losses, grad_norm)
        num_targets = sum(pack.num_targets for pack in self._packs)
        num_tokens = sum(pack.num_tokens for pack in self._packs)
        self.num_steps_done += 1
        self.trained_tokens += num_tokens
        self._packs = []
        return StepReport(
            step=self.num_steps_done,
            loss=sum(losses) / max(1, num_targets),
            token_accuracy=correct / max(1, num_targets),
            learning_rate=update.learning_rate,
            grad_norm=grad_norm,
            tokens_per_second=num_tokens / max(1e-9, self._clock() - self._step_started),
        )

    def _check(self, losses: Sequence[float], grad_norm: float) -> None:
        lines = [line for pack in self._packs for line in pack.lines]
        for line, loss in zip(lines, losses, strict=True):
            if not math.isfinite(loss):
                raise JobError(
                    "non_finite_loss",
                    f"loss is {loss} at step {self.num_steps_done + 1}, example on line {line}; "
                    f"lower the learning rate or inspect the example",
                )
        if not math.isfinite(grad_norm):
            raise JobError(
                "non_finite_gradient",
                f"gradient norm {grad_norm} at step {self.num_steps_done + 1}; lower the learning rate or "
                f"inspect the step's examples (lines {', '.join(map(str, lines))})",
            )
