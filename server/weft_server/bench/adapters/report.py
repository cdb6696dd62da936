"""The tables, comparisons and targets of `weft bench adapters`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from weft_server.bench.adapters.sources import DISK_COLD, HOST_CACHE, REDIS, Absent, Source
from weft_server.bench.report import Report, Table
from weft_server.bench.stats import Timings, median_ratio, percentile

_BESIDE_CEILINGS = (DISK_COLD, REDIS, HOST_CACHE)
"""What has no other rival."""

_MIN_SHARE = 80
"""Percent of a copy's rate that a load from the host cache is to reach."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of each round: `loads`, `ceilings` and `reads` by a source's name, `stages` and `peers` by
    their own. `why_no_peer` where PEFT was not measured."""

    loads: Timings
    ceilings: Timings
    reads: Timings
    stages: Timings
    peers: Timings
    why_no_peer: str | None


def add_loads(report: Report, sources: Sequence[Source | Absent], measured: Measured) -> None:
    """One row a place: how long until the adapter can be used, beside the ceiling of the same rounds."""
    table = report.table(
        "Until an adapter can be used",
        ("from", "p50, ms", "p95, ms", "MB/s", "ceiling", "ceiling's p50, ms", "of the ceiling, %"),
        "From asking the fetcher until kernels may read the arena. MB/s and ceilings count the file's bytes, "
        "for the host cache those that are copied.",
    )
    for source in sources:
        if isinstance(source, Absent):
            table.add(source.name, None, None, None, source.reason, None, None)
            continue
        seconds, best = measured.loads[source.name], measured.ceilings[source.name]
        rate = source.num_bytes / median(seconds) / 1e6
        share = 100 * median_ratio(best, seconds)
        table.add(source.name, *_times(seconds), rate, source.ceiling, 1000 * median(best), share)


def add_stages(report: Report, measured: Measured, file_bytes: int) -> None:
    """Where the time goes, each stage run by itself."""
    table = report.table(
        "Stages of a load",
        ("stage", "p50, ms", "p95, ms", "MB/s of the file"),
        "Each run by itself, so that their sum is not exactly a load. A load reads from one place, and goes "
        "through every stage below.",
    )
    for name, seconds in measured.reads.items():
        _add_stage(table, f"read and verify: {name}", seconds, file_bytes)
    for name, seconds in measured.stages.items():
        _add_stage(table, name, seconds, file_bytes)


def add_peers(report: Report, measured: Measured, source: str) -> None:
    """Loads from a warm page cache beside PEFT's, which neither verifies nor checks what it reads."""
    own = measured.loads[source]
    measure = f"adapter load, {source}"
    for name, seconds in measured.peers.items():
        ratio = median_ratio(seconds, own)
        report.compare(measure, "ms", 1000 * median(own), name, 1000 * median(seconds), ratio)
    if measured.why_no_peer is not None:
        report.compare(measure, "ms", 1000 * median(own), f"PEFT ({measured.why_no_peer})", None, None)
    ratios = [median_ratio(seconds, own) for seconds in measured.peers.values()]
    report.target(
        f"adapter load, {source}, against the faster of PEFT's",
        min(ratios, default=None),
        at_least=1.0,
        unit="x",
    )


def add_ceilings(report: Report, sources: Sequence[Source | Absent], measured: Measured) -> None:
    """Loads beside the bare reads, gets and copies of the same rounds, which do nothing else."""
    for source in sources:
        measure = f"adapter load, {source.name}"
        if isinstance(source, Absent):
            report.compare(measure, "ms", None, source.reason, None, None)
            continue
        if source.name not in _BESIDE_CEILINGS:
            continue
        seconds, best = measured.loads[source.name], measured.ceilings[source.name]
        ratio = median_ratio(best, seconds)
        report.compare(measure, "ms", 1000 * median(seconds), source.ceiling, 1000 * median(best), ratio)


def add_host_target(report: Report, measured: Measured, source: str) -> None:
    """A load of what is in host memory already, against a bare copy."""
    share = 100 * median_ratio(measured.ceilings[source], measured.loads[source])
    report.target(
        f"adapter load, {source}, share of a bare copy's rate", share, at_least=_MIN_SHARE, unit=" %"
    )


def as_data(measured: Measured) -> Mapping[str, Mapping[str, Mapping[str, float | int]]]:
    """Everything that was timed, for programs."""
    groups = {"loads": measured.loads, "ceilings": measured.ceilings, "reads": measured.reads}
    groups |= {"stages": measured.stages, "peers": measured.peers}
    return {
        group: {name: _summary(seconds) for name, seconds in found.items()} for group, found in groups.items()
    }


def _summary(seconds: Sequence[float]) -> dict[str, float | int]:
    p50_ms, p95_ms = _times(seconds)
    return {"p50_ms": p50_ms, "p95_ms": p95_ms, "rounds": len(seconds)}


def _add_stage(table: Table, name: str, seconds: Sequence[float], file_bytes: int) -> None:
    table.add(name, *_times(seconds), file_bytes / median(seconds) / 1e6)


def _times(seconds: Sequence[float]) -> tuple[float, float]:
    return 1000 * median(seconds), 1000 * percentile(seconds, 95.0)
