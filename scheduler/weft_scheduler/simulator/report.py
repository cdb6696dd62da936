"""What a simulation measured, as values: percentiles, attainment, finetuning, fairness.

Latencies are seconds as a client would see them: a token exists when its iteration has been committed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets of a request: seconds to its first token, mean seconds per further token; `percentile` of the
    requests are to keep both.
    """

    tpot_s: float = 0.050
    ttft_s: float = 2.0
    percentile: float = 95.0


@dataclass(slots=True)
class RequestRecord:
    """One request's life in the simulation; None until it happened."""

    tenant: str
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_tokens: int = 0
    first_token_s: float | None = None
    last_token_s: float = 0.0
    finished_s: float | None = None
    was_resident: bool | None = None

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean gap between its tokens; None before it ended, 0 for a single token."""
        if self.finished_s is None or self.first_token_s is None:
            return None
        return (self.finished_s - self.first_token_s) / max(1, self.num_tokens - 1)

    def attains(self, slo: Slo) -> bool:
        """Whether it kept both targets; a request that did not end did not."""
        ttft_s, tpot_s = self.ttft_s, self.tpot_s
        return ttft_s is not None and tpot_s is not None and ttft_s <= slo.ttft_s and tpot_s <= slo.tpot_s


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Median, 95th and 99th percentile, seconds; None where there is nothing."""

    p50: float | None
    p95: float | None
    p99: float | None

    @staticmethod
    def of(values: Iterable[float]) -> Percentiles:
        """Nearest-rank percentiles."""
        ordered = sorted(values)
        return Percentiles(*(percentile(ordered, q) for q in (50.0, 95.0, 99.0)))


def percentile(ordered: Sequence[float], q: float) -> float | None:
    """The nearest-rank percentile of sorted values; None if there are none."""
    if not ordered:
        return None
    return ordered[max(0, int(-(-len(ordered) * q // 100)) - 1)]


def weighted_percentiles(counted: Iterable[tuple[float, int]]) -> Percentiles:
    """Percentiles of values that occur so many times each."""
    ordered = sorted(counted)
    total = sum(count for _, count in ordered)
    return Percentiles(*(_weighted(ordered, total * q / 100.0) for q in (50.0, 95.0, 99.0)))


def _weighted(ordered: Sequence[tuple[float, int]], rank: float) -> float | None:
    seen = 0
    for value, count in ordered:
        seen += count
        if seen >= rank:
            return value
    return None


def jain_index(shares: Iterable[float]) -> float:
    """Jain's fairness index of what everybody got: 1 is equal, 1/n is one taking all; 1 of nobody.

    Source: Jain, Chiu, Hawe: A quantitative measure of fairness (DEC TR-301, 1984).
    """
    values = list(shares)
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares > 0.0 else 1.0


@dataclass(frozen=True, slots=True)
class Report:
    """The measures of one simulation; rates are per second of `duration_s`, fractions are 0 to 1.

    `duration_s` runs to the last token of a request, or as long as asked for. `gap` are the percentiles of
    single gaps between tokens, `tpot` of the requests' means. `trained_tokens` counts tokens that have been
    through the backward of all layers; `kept` compares with the same jobs alone. `service_fairness` is
    Jain's index of tenants' tokens (prompt 1, answer 2) over weight, `contended_fairness` the same of the
    10-second windows at whose both ends at least two tenants had requests waiting, of those tenants alone.
    `adapter_hit_rate` is the share of requests whose adapter was on the device when they arrived,
    `prefix_hit_rate` the share of prompt tokens found in the prefix cache, of those looked for.
    """

    policy: str
    duration_s: float
    num_requests: int
    num_finished: int
    num_refused: int
    ttft: Percentiles
    tpot: Percentiles
    gap: Percentiles
    e2e: Percentiles
    attainment: float
    goodput_per_s: float
    generated_per_s: float
    trained_tokens: float
    trained_per_s: float
    dedicated_per_s: float | None
    num_steps: int
    service_fairness: float
    contended_fairness: float | None
    training_fairness: float | None
    adapter_hit_rate: float | None
    prefix_hit_rate: float | None
    num_adapter_loads: int
    kv_mean: float
    kv_peak: float
    num_preemptions: int
    num_packs_dropped: int
    num_iterations: int
    busy_share: float
    cost_error_p50: float
    cost_error_p95: float
    ttft_p95_by_tenant: Mapping[str, float] = field(default_factory=dict)
    trained_by_tenant: Mapping[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> float | None:
        """Finetuning rate over that of the same jobs without requests; None without jobs."""
        return self.trained_per_s / self.dedicated_per_s if self.dedicated_per_s else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values, `kept` included."""
        values: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, Percentiles):
                value = {"p50": value.p50, "p95": value.p95, "p99": value.p99}
            values[name] = dict(value) if isinstance(value, Mapping) else value
        values["kept"] = self.kept
        return values
