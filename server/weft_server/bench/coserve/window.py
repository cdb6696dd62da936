"""What a contender is asked to run, and what it answers: plain values that travel as JSON.

Times are seconds of the machine's monotonic clock, which all processes share, or since the window began.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from weft_server.bench.coserve.workload import WorkloadSpec

Policy: TypeAlias = Literal["weft", "alternating", "dedicated"]


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time in which a contender is measured.

    It begins at `start_s` of the monotonic clock and lasts `seconds`; what the contender does before counts
    nothing, what it does afterwards (`drain_s` at most) is to finish the requests that arrived inside.
    `workload` is None where nobody generates. `trains`: a finetune job runs. `policy` and `ttft_s` are
    for Weft, `tpot_s` is for Weft and for two processes that take turns.
    """

    start_s: float
    seconds: float
    drain_s: float
    workload: WorkloadSpec | None = None
    trains: bool = False
    policy: Policy = "weft"
    tpot_s: float = 1.0
    ttft_s: float = 5.0
    takes_turns: bool = False

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Window:
        """Inverse of `dataclasses.asdict`."""
        workload = values["workload"]
        spec = None if workload is None else WorkloadSpec(**workload)
        return Window(**{**values, "workload": spec})


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's fate: when it arrived, and when its tokens came, in seconds since the window began.

    It is complete if it has `num_output_tokens` times.
    """

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    token_s: tuple[float, ...]

    @property
    def is_complete(self) -> bool:
        """Whether all its tokens came."""
        return len(self.token_s) >= self.num_output_tokens

    @property
    def ttft_s(self) -> float | None:
        """Arrival to the first token."""
        return self.token_s[0] - self.arrival_s if self.token_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first; None if it is not complete, 0 for a single token."""
        if not self.is_complete:
            return None
        return (self.token_s[-1] - self.token_s[0]) / max(1, len(self.token_s) - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Every gap between two tokens."""
        return [later - sooner for sooner, later in zip(self.token_s, self.token_s[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened in a window.

    `trained_tokens` is the finetuning done inside it (see `TrainMeter`), `busy_s` the time spent on
    iterations; `details` are figures of the contender's own.
    """

    answers: tuple[Answer, ...] = ()
    trained_tokens: float = 0.0
    busy_s: float = 0.0
    details: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Outcome:
        """Inverse of `dataclasses.asdict`."""
        answers = tuple(Answer(**{**one, "token_s": tuple(one["token_s"])}) for one in values["answers"])
        return Outcome(**{**values, "answers": answers})


class TrainMeter:
    """Finetuned tokens over time: a third of a token when it has gone forward through all layers, the rest
    when it has come back.

    Backward is taken as two thirds because it computes about twice as much (the layer again, and the gradient
    of its input). Over whole steps the weights do not matter; they let windows be shorter than a step.
    """

    def __init__(self, num_layers: int) -> None:
        """`num_layers` of the model: progress comes in tokens times layers."""
        self._num_layers = num_layers
        self._total = 0.0
        self._history: list[tuple[float, float]] = []

    def add(self, now_s: float, *, forward: float = 0.0, backward: float = 0.0) -> None:
        """Tokens times layers that were done by `now_s`."""
        self._total += (forward + 2.0 * backward) / (3.0 * self._num_layers)
        self._history.append((now_s, self._total))

    def between(self, start_s: float, end_s: float) -> float:
        """Tokens from one time to another; what was being done at either end counts in part."""
        return self._at(end_s) - self._at(start_s)

    def _at(self, time_s: float) -> float:
        before_s, before = None, 0.0
        for now_s, total in self._history:
            if now_s >= time_s:
                if before_s is None:
                    return total if now_s == time_s else 0.0
                return before + (total - before) * (time_s - before_s) / (now_s - before_s)
            before_s, before = now_s, total
        return before
