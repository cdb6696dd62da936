"""What was measured in one window, as numbers: latencies, attainment, finetuning, how busy it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weft_server.bench.coserve.window import Answer, Outcome
from weft_server.bench.stats import percentile

PERCENTS = (50.0, 95.0, 99.0)
ATTAINMENT = 0.95
"""The part of the requests that is to keep the objective."""


@dataclass(frozen=True, slots=True)
class Slo:
    """A latency objective: seconds per token after the first (a request's mean), and to the first."""

    name: str
    tpot_s: float
    ttft_s: float

    def attained(self, answers: Sequence[Answer]) -> float | None:
        """The part of the requests that kept both; unanswered ones did not. None without requests."""
        if not answers:
            return None
        return sum(self._keeps(answer) for answer in answers) / len(answers)

    def _keeps(self, answer: Answer) -> bool:
        ttft_s, tpot_s = answer.ttft_s, answer.tpot_s
        return ttft_s is not None and tpot_s is not None and ttft_s <= self.ttft_s and tpot_s <= self.tpot_s


@dataclass(frozen=True, slots=True)
class Point:
    """One contender in one window, under `slo` where it was told one (else it knows none)."""

    contender: str
    requests_per_s: float
    slo: Slo | None
    seconds: float
    outcome: Outcome

    @property
    def trained_per_s(self) -> float:
        """Finetuned tokens a second."""
        return self.outcome.trained_tokens / self.seconds

    @property
    def generated_per_s(self) -> float:
        """Tokens generated a second, inside the window."""
        times = (time for answer in self.outcome.answers for time in answer.token_s)
        return sum(time <= self.seconds for time in times) / self.seconds

    @property
    def busy_share(self) -> float:
        """The part of the window that iterations took."""
        return min(1.0, self.outcome.busy_s / self.seconds)

    def attained(self, slo: Slo) -> float | None:
        """See `Slo.attained`."""
        return slo.attained(self.outcome.answers)

    def tpot_ms(self, percent: float) -> float | None:
        """Percentile of the requests' mean milliseconds per token."""
        answers = (a for a in self.outcome.answers if a.num_output_tokens > 1)
        return _percentile_ms([a.tpot_s for a in answers], percent)

    def ttft_ms(self, percent: float) -> float | None:
        """Percentile of the milliseconds to the first token."""
        return _percentile_ms([answer.ttft_s for answer in self.outcome.answers], percent)

    def gap_ms(self, percent: float) -> float | None:
        """Percentile of all gaps between two tokens."""
        return _percentile_ms([gap for answer in self.outcome.answers for gap in answer.gaps_s], percent)

    def to_dict(self) -> dict[str, Any]:
        """Every number, JSON-able; token times are left out."""
        answers = self.outcome.answers
        return {
            "contender": self.contender,
            "requests_per_s": self.requests_per_s,
            "slo": None if self.slo is None else self.slo.name,
            "seconds": self.seconds,
            "num_requests": len(answers),
            "num_unanswered": sum(not answer.is_complete for answer in answers),
            "attained": None if self.slo is None else self.attained(self.slo),
            "trained_per_s": self.trained_per_s,
            "generated_per_s": self.generated_per_s,
            "busy_share": self.busy_share,
            "tpot_ms": [self.tpot_ms(percent) for percent in PERCENTS],
            "ttft_ms": [self.ttft_ms(percent) for percent in PERCENTS],
            "gap_ms": [self.gap_ms(percent) for percent in PERCENTS],
            **self.outcome.details,
        }


def _percentile_ms(values: Sequence[float | None], percent: float) -> float | None:
    """The percentile, in milliseconds; None if there are no values, or it lies among the missing ones."""
    known = [1000.0 * value for value in values if value is not None]
    num_missing = len(values) - len(known)
    if not known or percent / 100.0 * (len(values) - 1) > len(values) - 1 - num_missing:
        return None
    # Missing ones took longer than all others, so they are the upper end.
    return percentile(known + [max(known)] * num_missing, percent)
