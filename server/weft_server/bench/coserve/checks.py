"""What contenders must agree on before any of them is timed: log-probabilities of prompts under their
adapters, and the first optimizer step.

In bf16 two right answers differ by rounding, so errors are relative: to the spread of the log-probabilities,
to the loss, to the gradient norm. A wrong or missing adapter exceeds the tolerances by far, which every run
shows beside the check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import pstdev
from typing import Any

LOGPROB_TOLERANCE = 0.10
LOSS_TOLERANCE = 0.01
NORM_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class FirstStep:
    """Mean loss and gradient norm (before clipping) of the first optimizer step."""

    loss: float
    grad_norm: float


@dataclass(frozen=True, slots=True)
class Check:
    """What one contender computed: the log-probability of every prompt token but the first, by request, and
    the first optimizer step; a contender that only generates or only trains leaves the other out.
    """

    logprobs: Sequence[Sequence[float]] = ()
    first_step: FirstStep | None = None

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Check:
        """Inverse of `dataclasses.asdict`."""
        step = values["first_step"]
        return Check(values["logprobs"], None if step is None else FirstStep(**step))


def logprob_error(own: Check, other: Check) -> float:
    """Root mean square difference, as a part of the standard deviation of the other's.

    Raises:
        ValueError: they are not of the same prompts.
    """
    ours, theirs = ([value for row in check.logprobs for value in row] for check in (own, other))
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} log-probabilities cannot be compared with {len(theirs)}")
    squares = sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True))
    return sqrt(squares / len(ours)) / pstdev(theirs)


def step_errors(own: Check, other: Check) -> tuple[float, float]:
    """Relative differences of loss and gradient norm.

    Raises:
        ValueError: one of them has not trained.
    """
    if own.first_step is None or other.first_step is None:
        raise ValueError("the first step of a contender that did not train cannot be compared")
    return (
        abs(own.first_step.loss / other.first_step.loss - 1.0),
        abs(own.first_step.grad_norm / other.first_step.grad_norm - 1.0),
    )
