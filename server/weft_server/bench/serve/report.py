"""The phases of a run as a report."""

from __future__ import annotations

import argparse
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weft_server.bench.report import Report
from weft_server.bench.serve.load import Run
from weft_server.bench.serve.measures import LoadReport


@dataclass(frozen=True, slots=True)
class Phase:
    """One measured window: what ran, the requests (None where none were sent), and finetuned tokens a
    second (None where nothing was finetuned or the server does not say)."""

    name: str
    load: LoadReport | None
    run: Run | None
    trained_per_s: float | None


def fill(report: Report, arguments: argparse.Namespace, phases: Sequence[Phase]) -> None:
    """Tables, notes and data of all phases."""
    columns = ("phase", "requests", "answered", "errors", "ms to first token", "ms per token", "ms in all")
    table = report.table(
        "Latencies", columns, "Milliseconds are p50 / p95 / p99; times count from when a request was due."
    )
    rates = report.table(
        "Rates",
        (
            "phase",
            "attained",
            "goodput, requests/s",
            "generated tokens/s",
            "prompt tokens/s",
            "finetuned tokens/s",
        ),
        f"Attained: within {arguments.ttft_slo_ms:g} ms to the first token and {arguments.tpot_slo_ms:g} ms "
        "per token.",
    )
    client = report.table(
        "The client itself",
        ("phase", "ms late", "sent more than 10 ms late", "part of a core"),
        "Requests leave at the trace's times, answered or not.",
    )
    for phase in phases:
        load = phase.load
        if load is not None:
            errors = ", ".join(f"{count}x {kind}" for kind, count in sorted(load.errors.items())) or "none"
            times = [_triple(load.ttft_ms), _triple(load.tpot_ms, 1), _triple(load.total_ms)]
            table.add(phase.name, load.num_requests, load.num_answered, errors, *times)
            late = f"{load.late:.1%}"
            client.add(phase.name, _triple(load.lag_ms, 1), late, round(load.client_cpu, 3))
            if load.late > 0.01:
                report.notes.append(
                    f"{phase.name}: the client fell behind in {late} of the requests; the load was lower and "
                    "burstier than the trace's."
                )
        rates.add(
            phase.name,
            "–" if load is None or load.attained is None else f"{load.attained:.1%}",
            "–" if load is None else round(load.goodput_per_s, 3),
            "–" if load is None else round(load.generated_per_s, 1),
            "–" if load is None else round(load.prompt_per_s, 1),
            "–" if phase.trained_per_s is None else round(phase.trained_per_s, 1),
        )
    server_cpu_s = _children_cpu_s()
    if arguments.url is None:
        report.notes.append(f"Processor time of the server, from its start to its end: {server_cpu_s:.1f} s.")
    report.data = {
        "trace": "drawn" if arguments.trace is None else Path(arguments.trace).name,
        "phases": [
            {
                "name": phase.name,
                "trained_per_s": phase.trained_per_s,
                "load": None if phase.load is None else phase.load.to_dict(),
            }
            for phase in phases
        ],
    }


def _children_cpu_s() -> float:
    """Of the processes that have been started and have ended: the server and its engine."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _triple(values: Sequence[float] | None, digits: int = 0) -> str:
    if values is None:
        return "–"
    return " / ".join(f"{value:.{digits}f}" for value in values)
