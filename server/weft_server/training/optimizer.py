"""AdamW on flat vectors: one adapter's whole training state is four vectors of the same layout.

Gradients arrive as sums over the step's trained tokens; the division by their number happens here, once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft_server.protocol import JobSpec
from weft_server.training.schedule import learning_rate

_CLIP_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True, slots=True)
class OptimizerReport:
    """What one update did: the gradient norm before clipping and the learning rate used."""

    grad_norm: float
    learning_rate: float


class NonFiniteGradient(Exception):
    """The gradient's norm is NaN or infinite; nothing was updated."""


class FlatAdamW:
    """`torch.optim.AdamW` over one flat fp32 (or fp64) parameter vector."""

    def __init__(self, master: Tensor, spec: JobSpec) -> None:
        self.master = torch.nn.Parameter(master)
        self.grad = torch.zeros_like(master)
        self._spec = spec
        self._optimizer = torch.optim.AdamW(
            [self.master],
            lr=spec.learning_rate,
            betas=(spec.adam_beta1, spec.adam_beta2),
            eps=spec.adam_eps,
            weight_decay=spec.weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def step(self, step: int, num_target_tokens: int) -> OptimizerReport:
        """Update with the accumulated gradient sum, then clear it.

        Raises:
            NonFiniteGradient: the norm is not finite.
        """
        self.grad /= max(1, num_target_tokens)
        norm = float(torch.linalg.vector_norm(self.grad))
        if not norm < float("inf"):
            raise NonFiniteGradient(f"gradient norm {norm}")
        if self._spec.max_grad_norm > 0:
            self.grad *= min(1.0, self._spec.max_grad_norm / (norm + _CLIP_EPS))
        rate = learning_rate(self._spec, step)
        self._optimizer.param_groups[0]["lr"] = rate
        self.master.grad = self.grad
        self._optimizer.step()
        self.master.grad = None
        self.grad.zero_()
        return OptimizerReport(grad_norm=norm, learning_rate=rate)

    def state(self) -> dict[str, Tensor]:
        """Copies of `master`, `m`, `v` on the CPU, and Adam's own step count `[1]`."""
        state = self._optimizer.state.get(self.master, {})
        zeros = torch.zeros_like(self.master.data)
        vectors = {
            "master": self.master.data,
            "m": state.get("exp_avg", zeros),
            "v": state.get("exp_avg_sq", zeros),
        }
        count = torch.tensor([float(state.get("step", 0.0))])
        return {name: vector.to("cpu", copy=True) for name, vector in vectors.items()} | {"adam_step": count}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.master.copy_(state["master"])
        self.grad.zero_()
        if float(state["adam_step"]) > 0:
            self._optimizer.state[self.master] = {
                "step": state["adam_step"].to(self.master.device, torch.float32, copy=True).reshape(()),
                "exp_avg": state["m"].to(self.master.device, self.master.dtype, copy=True),
                "exp_avg_sq": state["v"].to(self.master.device, self.master.dtype, copy=True),
            }
