"""transformers + PEFT as a trainer: gradient accumulation, clipping and AdamW, endlessly.

Activations are kept (no checkpointing), which is PEFT's fastest way where memory allows; adapters are fp32
and computed under autocast, as transformers' Trainer does with `bf16=True`. On a GPU, progress is counted
when work is issued, so that counting does not slow it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from weft_server.bench.coserve.checks import Check, FirstStep
from weft_server.bench.coserve.setup import Setup, make_adapters, make_examples
from weft_server.bench.coserve.turns import TrainerSide
from weft_server.bench.coserve.window import Outcome, TrainMeter, Window
from weft_server.bench.coserve.workload import BenchRequest
from weft_server.bench.peers import PeerFormat, add_adapters, build_peer


class _WindowOver(Exception):
    """Ends a step in the middle."""


@dataclass(slots=True)
class _Progress:
    """Where finetuning is counted, and who is asked at every pause point."""

    meter: TrainMeter
    window: Window
    turns: TrainerSide | None

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.window.start_s


class PeerTrainer:
    """The model with one trainable adapter."""

    def __init__(self, setup: Setup, turn_fileno: int | None) -> None:
        """Loads the model; with `turn_fileno` it can take turns with a generator."""
        self._setup = setup
        model = setup.random_model()
        peer = build_peer(model, cast(PeerFormat, setup.quantization))
        self._model = add_adapters(peer, make_adapters(setup, model)[:1], [torch.float32]).train()
        self._device = model.device
        self._trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=setup.learning_rate, weight_decay=0.0)
        self._examples = torch.from_numpy(make_examples(setup)).to(self._device)
        self._is_bf16 = setup.dtype == "bfloat16"
        self._num_layers = model.config.num_layers
        self._progress: _Progress | None = None
        self._turns = None if turn_fileno is None else TrainerSide(turn_fileno, self._synchronize)
        self._install_hooks()

    # ------------------------------------------------------------ the contender's commands

    def run(self, window: Window) -> Outcome:
        """Train until the window is over; where turns are taken, until the generator says so."""
        turns = self._turns if window.takes_turns else None
        self._progress = _Progress(TrainMeter(self._num_layers), window, turns)
        num_steps = 0
        if turns is not None:
            turns.begin()
        try:
            while True:
                self._step()
                num_steps += 1
        except _WindowOver:
            meter, self._progress = self._progress.meter, None
        self._optimizer.zero_grad()
        return Outcome(
            trained_tokens=meter.between(0.0, window.seconds),
            busy_s=window.seconds,
            details={"num_steps": float(num_steps)},
        )

    def answer_alone(self, requests: list[BenchRequest]) -> list[list[float]]:
        """A trainer answers nobody."""
        raise NotImplementedError(f"{len(requests)} requests were sent to a trainer")

    def check(self, requests: list[BenchRequest]) -> Check:
        """The first optimizer step."""
        del requests
        loss, norm = self._step()
        return Check(first_step=FirstStep(loss, norm))

    def close(self) -> None:
        """Nothing to end."""

    # ------------------------------------------------------------ inside

    def _step(self) -> tuple[float, float]:
        """One optimizer step; returns mean loss and gradient norm."""
        total = torch.zeros((), device=self._device)
        for ids in torch.split(self._examples, self._setup.peer_micro_batch):
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_bf16):
                loss = self._model(input_ids=ids, labels=ids).loss * (len(ids) / len(self._examples))
            loss.backward()
            total += loss.detach()
            self._count(backward=float(ids.numel()))
        norm = torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(total), float(norm)

    def _install_hooks(self) -> None:
        for idx, layer in enumerate(self._model.get_base_model().model.layers):
            layer.register_forward_hook(self._layer_hook(is_last=idx == self._num_layers - 1))
        for module in self._model.modules():
            if hasattr(module, "lora_A"):
                module.register_forward_hook(self._pause_hook)

    def _layer_hook(self, *, is_last: bool) -> Callable[[Any, Any, Any], None]:
        def forwarded(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            num_tokens = float(hidden.shape[0] * hidden.shape[1])
            self._count(forward=num_tokens)
            if not is_last and hidden.requires_grad:
                # Called when the gradient of this layer's output is there: the next layer has come back.
                hidden.register_hook(lambda _: self._count(backward=num_tokens))

        return forwarded

    def _pause_hook(self, _module: Any, _inputs: Any, output: Any) -> None:
        self._pause_point()
        if output.requires_grad:
            output.register_hook(lambda _: self._pause_point())

    def _pause_point(self) -> None:
        progress = self._progress
        if progress is None:
            return
        if progress.turns is not None:
            progress.turns.pause_point()
            is_over = progress.turns.is_over
        else:
            is_over = progress.now_s > progress.window.seconds + progress.window.drain_s
        if is_over:
            raise _WindowOver

    def _count(self, *, forward: float = 0.0, backward: float = 0.0) -> None:
        progress = self._progress
        if progress is not None:
            progress.meter.add(progress.now_s, forward=forward, backward=backward)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
