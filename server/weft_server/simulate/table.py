"""Reports as text."""

from __future__ import annotations

from collections.abc import Sequence

from weft_scheduler.simulator.capacity import Capacity
from weft_scheduler.simulator.report import Percentiles, Report, Slo


def report_lines(report: Report, slo: Slo) -> list[str]:
    """The report of one simulation, a line for each measure."""
    lines = [
        f"requests       {report.num_finished} of {report.num_requests} finished in {report.duration_s:.1f} s"
        + (f", {report.num_refused} refused as too large" if report.num_refused else ""),
        f"               {'p50':>10} {'p95':>10} {'p99':>10}",
        _latency("first token", report.ttft),
        _latency("per token", report.tpot),
        _latency("single gaps", report.gap),
        _latency("whole request", report.e2e),
        f"attainment     {report.attainment:.1%} within {slo.ttft_s * 1000:g} ms to the first token and "
        f"{slo.tpot_s * 1000:g} ms per token (target: {slo.percentile:g} %)",
        f"goodput        {report.goodput_per_s:.2f} requests/s; "
        f"{report.generated_per_s:.0f} tokens/s generated",
        f"finetuning     {_finetuning(report)}",
        f"fairness       {_fairness(report)}",
        f"memory         KV {report.kv_mean:.1%} on average, {report.kv_peak:.1%} at most; "
        f"{report.num_preemptions} preemptions, {report.num_packs_dropped} packs dropped",
    ]
    if report.prefix_hit_rate is not None:
        lines.append(f"prefix cache   {report.prefix_hit_rate:.1%} of the prompt tokens found")
    if report.adapter_hit_rate is not None:
        lines.append(
            f"adapters       {report.adapter_hit_rate:.1%} on the device at arrival; "
            f"{report.num_adapter_loads} loads"
        )
    lines.append(
        f"iterations     {report.num_iterations}, busy {report.busy_share:.1%} of the time; predicted within "
        f"{report.cost_error_p50:.1%} (p50) and {report.cost_error_p95:.1%} (p95)"
    )
    return lines


def _latency(name: str, values: Percentiles) -> str:
    return f"{name:<15}" + " ".join(_milliseconds(v) for v in (values.p50, values.p95, values.p99))


def _milliseconds(seconds: float | None) -> str:
    return f"{'–':>10}" if seconds is None else f"{seconds * 1000:>7.1f} ms"


def _finetuning(report: Report) -> str:
    if report.dedicated_per_s is None:
        return "none"
    kept = report.kept or 0.0
    return (
        f"{report.trained_per_s:.0f} tokens/s in {report.num_steps} steps: {kept:.1%} of the "
        f"{report.dedicated_per_s:.0f} that the jobs reach alone"
    )


def _fairness(report: Report) -> str:
    parts = [f"{report.service_fairness:.3f} of all service"]
    if report.contended_fairness is not None:
        parts.append(f"{report.contended_fairness:.3f} while tenants waited")
    if len(report.ttft_p95_by_tenant) > 1:
        worst = max(report.ttft_p95_by_tenant, key=lambda tenant: report.ttft_p95_by_tenant[tenant])
        parts.append(f"worst p95 of a first token {report.ttft_p95_by_tenant[worst] * 1000:.0f} ms ({worst})")
    if report.training_fairness is not None:
        parts.append(f"{report.training_fairness:.3f} of finetuning")
    return "Jain's index over tenants: " + ", ".join(parts)


def capacity_lines(tried: Sequence[Capacity], slo: Slo, max_replicas: int) -> list[str]:
    """What every number of GPUs gives, and the answer."""
    lines = ["", "   GPUs  attainment  worst TTFT p95  worst TPOT p95  finetuning tokens/s  kept"]
    for item in tried:
        kept = "–" if item.kept is None else f"{item.kept:.1%}"
        lines.append(
            f"{item.num_replicas:>7}  {item.attainment:>10.1%}  {item.worst_ttft_p95 * 1000:>11.0f} ms  "
            f"{item.worst_tpot_p95 * 1000:>11.1f} ms  {item.trained_per_s:>19.0f}  {kept:>5}"
        )
    enough = next((item for item in tried if item.is_enough), None)
    goal = f"{slo.percentile:g} % of the requests within their targets"
    if enough is None:
        lines.append(f"Not even {max_replicas} GPUs keep {goal}. Try more, or looser targets.")
    else:
        noun = "GPU" if enough.num_replicas == 1 else "GPUs"
        lines.append(
            f"{enough.num_replicas} {noun} for {goal}, with {enough.trained_per_s:.0f} finetuning tokens/s."
        )
    lines.append(
        "Replicas are identical: a request goes to its adapter's replica, else to the least loaded one; "
        "each runs the jobs."
    )
    return lines
