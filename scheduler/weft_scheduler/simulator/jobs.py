"""Finetune jobs of a simulation: the lengths of their examples, and the packs of their steps.

A step is `batch_size` examples, packed in order as the engine packs them; how many tokens of a pack have been
through a whole backward is counted layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from weft_scheduler.training import PackSpec

_LENGTH_SPREAD = 0.5


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One job: steps of `batch_size` examples of `example_tokens` tokens on average (log-normal).

    `num_steps` None means that it never ends. `target_share` of the tokens is trained on.
    """

    job_id: str
    tenant: str = "default"
    batch_size: int = 8
    example_tokens: int = 512
    max_example_tokens: int = 2048
    num_steps: int | None = None
    rank: int = 16
    target_share: float = 0.5
    start_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse sizes that make no job.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        for name in ("batch_size", "example_tokens", "max_example_tokens", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"job {self.job_id}: {name} is {getattr(self, name)}; it must be at least 1")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"job {self.job_id}: num_steps is {self.num_steps}; it must be at least 1")

    @property
    def adapter_key(self) -> str:
        """The key of its training adapter."""
        return f"job:{self.job_id}"


def pack_lengths(lengths: Sequence[int], max_pack_tokens: int) -> list[int]:
    """Tokens of the packs of these examples, in order, each of at most `max_pack_tokens`."""
    packs: list[int] = []
    for length in lengths:
        if packs and packs[-1] + length <= max_pack_tokens:
            packs[-1] += length
        else:
            packs.append(length)
    return packs


class SimulatedJob:
    """One job's steps, one after the other."""

    def __init__(self, spec: JobSpec, *, max_pack_tokens: int, seed: int) -> None:
        """The lengths of its examples follow from the seed and the job's id."""
        self.spec = spec
        self._most = min(spec.max_example_tokens, max_pack_tokens)
        self._max_pack_tokens = max_pack_tokens
        self._random = Random(f"job/{seed}/{spec.job_id}")
        self.num_steps_done = 0
        self._num_started = 0

    @property
    def is_finished(self) -> bool:
        """Whether its last step is done."""
        return self.spec.num_steps is not None and self.num_steps_done >= self.spec.num_steps

    def next_step(self) -> list[PackSpec]:
        """The packs of its next step."""
        step, spec = self._num_started, self.spec
        self._num_started += 1
        lengths = [self._draw_length() for _ in range(spec.batch_size)]
        return [
            PackSpec(
                pack_id=f"{spec.job_id}/{step}/{idx}",
                job_id=spec.job_id,
                tenant=spec.tenant,
                num_tokens=num_tokens,
                adapter=spec.adapter_key,
                num_target_tokens=max(1, round(num_tokens * spec.target_share)),
            )
            for idx, num_tokens in enumerate(pack_lengths(lengths, self._max_pack_tokens))
        ]

    def _draw_length(self) -> int:
        mu = math.log(self.spec.example_tokens) - _LENGTH_SPREAD**2 / 2
        return min(max(2, round(self._random.lognormvariate(mu, _LENGTH_SPREAD))), self._most)
