"""What a run of requests amounts to: latencies, goodput, errors by kind, and how honest the load was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weft_server.bench.serve.load import Run, Sent
from weft_server.bench.stats import percentile

PERCENTS = (50.0, 95.0, 99.0)
LATE_S = 0.010
"""A request that left later than this was delayed by the client, not by the server."""


@dataclass(frozen=True, slots=True)
class Slo:
    """Milliseconds per token after the first, and to the first."""

    tpot_ms: float
    ttft_ms: float


@dataclass(frozen=True, slots=True)
class Latencies:
    """One answered request, milliseconds. `ttft_ms` and `total_ms` count from when it was due, so that a late
    client makes them longer rather than hiding them; `tpot_ms` is the mean after the first token.
    """

    ttft_ms: float
    tpot_ms: float
    total_ms: float

    @staticmethod
    def of(sent: Sent) -> Latencies | None:
        """None if it was not answered."""
        reply = sent.reply
        if reply.error is not None or not reply.pieces_s or reply.num_tokens < 1:
            return None
        first_s, last_s = reply.pieces_s[0], reply.pieces_s[-1]
        per_token_s = (last_s - first_s) / max(1, reply.num_tokens - 1)
        return Latencies(
            1000 * (first_s - sent.due_s), 1000 * per_token_s, 1000 * (reply.ended_s - sent.due_s)
        )


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Numbers of one run. `*_ms` are p50, p95 and p99; `late` is the part of the requests that left late.

    `goodput_per_s` counts requests that kept the objective. Rates are per second from the beginning to the
    last answer or the end of the window, whichever is later.
    """

    num_requests: int
    num_answered: int
    errors: dict[str, int]
    ttft_ms: tuple[float, ...] | None
    tpot_ms: tuple[float, ...] | None
    total_ms: tuple[float, ...] | None
    attained: float | None
    goodput_per_s: float
    generated_per_s: float
    prompt_per_s: float
    lag_ms: tuple[float, ...] | None
    late: float
    client_cpu: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def report_of(run: Run, slo: Slo) -> LoadReport:
    """Everything about a run."""
    found = [(sent, latencies) for sent in run.sent if (latencies := Latencies.of(sent)) is not None]
    ends = [sent.reply.ended_s - run.began_s for sent in run.sent]
    seconds = max([run.seconds, *ends])
    kept = sum(lat.ttft_ms <= slo.ttft_ms and lat.tpot_ms <= slo.tpot_ms for _, lat in found)
    lags = [1000 * sent.lag_s for sent in run.sent]
    return LoadReport(
        num_requests=len(run.sent),
        num_answered=len(found),
        errors=dict(Counter(sent.reply.error or "empty answer" for sent in _unanswered(run))),
        ttft_ms=_percentiles([latencies.ttft_ms for _, latencies in found]),
        tpot_ms=_percentiles([latencies.tpot_ms for sent, latencies in found if sent.reply.num_tokens > 1]),
        total_ms=_percentiles([latencies.total_ms for _, latencies in found]),
        attained=kept / len(run.sent) if run.sent else None,
        goodput_per_s=kept / seconds,
        generated_per_s=sum(sent.reply.num_tokens for sent, _ in found) / seconds,
        prompt_per_s=sum(sent.request.num_prompt_tokens for sent, _ in found) / seconds,
        lag_ms=_percentiles(lags),
        late=sum(lag > 1000 * LATE_S for lag in lags) / len(lags) if lags else 0.0,
        client_cpu=run.client_cpu_s / seconds,
    )


def _unanswered(run: Run) -> list[Sent]:
    return [sent for sent in run.sent if Latencies.of(sent) is None]


def _percentiles(values: Sequence[float]) -> tuple[float, ...] | None:
    return tuple(percentile(values, percent) for percent in PERCENTS) if values else None
