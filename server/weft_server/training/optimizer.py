"""AdamW on flat vectors: one adapter's whole training state is four vectors of the same layout.

Gradients arrive as sums over the step's trained tokens; the division by their number happens here, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from weft_server.protocol import JobSpec
from weft_server.training.schedule import learning_rate

_CLIP_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True, slots=True)
class OptimizerUpdate:
    """An update that was issued: the gradient norm before clipping, a scalar on the device, and the learning
    rate."""

    grad_norm: Tensor
    learning_rate: float


class FlatAdamW:
    """`torch.optim.AdamW` over one flat fp32 (or fp64) parameter vector, `master`.

    Its functional form: the class imports torch's compiler, which would halt a serving engine for seconds.
    """

    def __init__(self, master: Tensor, spec: JobSpec) -> None:
        self.master = master
        self.grad = torch.zeros_like(master)
        self._m = torch.zeros_like(master)
        self._v = torch.zeros_like(master)
        self._num_updates = torch.zeros((), dtype=torch.float32, device=master.device)
        self._spec = spec

    @torch.no_grad()
    def step(self, step: int, num_target_tokens: int, is_valid: Tensor | None = None) -> OptimizerUpdate:
        """Issue the update with the accumulated gradient sum, then clear it; waits for nothing.

        Nothing but the gradient changes where its norm is not finite, or where `is_valid`, a bool scalar on
        the device, is false.
        """
        self.grad /= max(1, num_target_tokens)
        norm = torch.linalg.vector_norm(self.grad)
        is_finite = torch.isfinite(norm)
        skip = ~(is_finite if is_valid is None else is_finite & is_valid)
        if self._spec.max_grad_norm > 0:
            self.grad *= (self._spec.max_grad_norm / (norm + _CLIP_EPS)).clamp(max=1.0)
        rate = learning_rate(self._spec, step)
        adamw(
            [self.master],
            [self.grad],
            [self._m],
            [self._v],
            [],
            [self._num_updates],
            fused=True,
            found_inf=skip.to(torch.float32),
            amsgrad=False,
            beta1=self._spec.adam_beta1,
            beta2=self._spec.adam_beta2,
            lr=rate,
            weight_decay=self._spec.weight_decay,
            eps=self._spec.adam_eps,
            maximize=False,
        )
        self.grad.zero_()
        return OptimizerUpdate(grad_norm=norm, learning_rate=rate)

    def state(self) -> dict[str, Tensor]:
        """Copies of `master`, `m`, `v` on the CPU, and Adam's own step count `[1]`."""
        vectors = {
            "master": self.master,
            "m": self._m,
            "v": self._v,
            "adam_step": self._num_updates.reshape(1),
        }
        return {name: vector.to("cpu", copy=True) for name, vector in vectors.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.master.copy_(state["master"], non_blocking=True)
        self._m.copy_(state["m"], non_blocking=True)
        self._v.copy_(state["v"], non_blocking=True)
        self._num_updates.copy_(state["adam_step"].reshape(()), non_blocking=True)
        self.grad.zero_()
