"""What a committed iteration did: the result that the engine reports, and the outcomes that follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from weft_scheduler.plan import StepPlan


@dataclass(frozen=True, slots=True)
class StepResult:
    """One executed plan: the token sampled for every segment with `samples`, and the seconds it took.

    `num_slices` and `num_optimizer_steps` say how many of the plan's, from the first, have run (None: all).
    Fewer are allowed where plans are made one at a time; without all slices no optimizer step has run.
    """

    sampled: dict[str, int] = field(default_factory=dict)
    elapsed_s: float = 0.0
    num_slices: int | None = None
    num_optimizer_steps: int | None = None

    def num_run(self, plan: StepPlan) -> tuple[int, int]:
        """How many backward slices and optimizer steps of the plan have run.

        Raises:
            ValueError: that cannot be: more than there are, or an optimizer step before the end of backward.
        """
        all_slices, all_steps = len(plan.backward), len(plan.optimizer_steps)
        num_slices = all_slices if self.num_slices is None else self.num_slices
        num_steps = all_steps if self.num_optimizer_steps is None else self.num_optimizer_steps
        most_steps = all_steps if num_slices == all_slices else 0
        if not (0 <= num_slices <= all_slices and 0 <= num_steps <= most_steps):
            raise ValueError(
                f"{num_slices} slices and {num_steps} optimizer steps cannot be what has run of "
                f"{all_slices} and {all_steps}"
            )
        return num_slices, num_steps


class SequenceToken(NamedTuple):
    """A sequence has got a token; with a `finish_reason` it was the last one.

    `num_cached_tokens` of its prompt were in the prefix cache when it was first admitted.
    """

    sequence_id: str
    token_id: int
    finish_reason: Literal["stop", "length"] | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PackDone:
    """The last slice (layer 0, window 0) of a pack has run."""

    pack_id: str


@dataclass(frozen=True, slots=True)
class StepDone:
    """The optimizer step of a job has run; packs of its next step may be added."""

    job_id: str


Outcome: TypeAlias = SequenceToken | PackDone | StepDone
