"""How many devices a trace needs: the smallest number of identical replicas on which enough requests keep
their targets.

Requests that name an adapter go to that adapter's replica, the others to the least loaded one (see
`trace.split_over_replicas`). Every replica runs its own copy of the jobs. More replicas never serve worse, so
the number is doubled until it suffices, then halved into.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from weft_scheduler.simulator.report import Report
from weft_scheduler.simulator.simulation import Setup, simulate
from weft_scheduler.simulator.trace import Trace, split_over_replicas


@dataclass(frozen=True, slots=True)
class Capacity:
    """`num_replicas` serve the trace so: the share of requests that keep the targets, the worst replica's
    95th percentiles, and the finetuning tokens a second of all replicas together.
    """

    num_replicas: int
    attainment: float
    is_enough: bool
    worst_ttft_p95: float
    worst_tpot_p95: float
    trained_per_s: float
    kept: float | None


def plan_replicas(
    trace: Trace, setup: Setup, *, max_replicas: int, dedicated_per_s: float | None, duration_s: float | None
) -> list[Capacity]:
    """All numbers that were tried, ascending; the first that `is_enough` is the answer, if any is."""
    tried: dict[int, Capacity] = {}

    def is_enough(num: int) -> bool:
        if num not in tried:
            tried[num] = _try(trace, setup, num, dedicated_per_s, duration_s)
        return tried[num].is_enough

    low, high = 0, 1
    while not is_enough(high):
        if high >= max_replicas:
            return [tried[num] for num in sorted(tried)]
        low, high = high, min(2 * high, max_replicas)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return [tried[num] for num in sorted(tried)]


def _try(
    trace: Trace, setup: Setup, num: int, dedicated_per_s: float | None, duration_s: float | None
) -> Capacity:
    parts = [part for part in split_over_replicas(trace, num) if part]
    quiet = replace(setup, timeline_s=(0.0, 0.0))
    reports = [simulate(part, quiet, duration_s=duration_s).report for part in parts]
    attained = sum(report.attainment * report.num_requests for report in reports)
    attainment = attained / sum(report.num_requests for report in reports)
    trained = sum(report.trained_per_s for report in reports)
    trained += (num - len(parts)) * (dedicated_per_s or 0.0)
    return Capacity(
        num_replicas=num,
        attainment=attainment,
        is_enough=attainment >= setup.slo.percentile / 100.0,
        worst_ttft_p95=_worst(reports, "ttft"),
        worst_tpot_p95=_worst(reports, "tpot"),
        trained_per_s=trained,
        kept=trained / (num * dedicated_per_s) if dedicated_per_s else None,
    )


def _worst(reports: list[Report], measure: str) -> float:
    return max(getattr(report, measure).p95 or 0.0 for report in reports)
