"""A run's results as a report: targets, tuning, the curves as a table and as figures."""

from __future__ import annotations

from collections.abc import Sequence

from weft_server.bench.coserve.figure import draw
from weft_server.bench.coserve.measures import ATTAINMENT, PERCENTS, Point, Slo
from weft_server.bench.coserve.options import Options
from weft_server.bench.coserve.results import Results
from weft_server.bench.report import Report

CONTENDERS = ("Weft", "alternating", "two processes", "taking turns")

_NOTES = (
    "Finetuned tokens: a third when a token has gone forward through all layers, the rest when it has come "
    "back.",
    "Attained: requests whose mean time per token and time to the first token kept the objective; those "
    "unanswered at the end of a window's drain did not. An objective's time per token is relative to Weft's "
    "unloaded one, for every contender.",
    "Better by 0: Weft attained less than the rival, and less than 95 %, so its finetuning is no gain.",
    "Better by, not measured: the rival attained less than 95 %, and more than 10 points less than Weft, so "
    "what it finetuned was not at the same attainment.",
    "Alternating: Weft's engine and kernels, iterations of inference and of finetuning in turn, the latter "
    "as long as the objective leaves.",
    "Two processes: a transformers + PEFT loop that generates (continuous batching, adapters mixed by "
    "`adapter_names`, whole prompts at a time) beside a transformers + PEFT training loop. Taking turns: "
    "the same two, the trainer running between two tokens for what the objective leaves (5 ms at least), and "
    "while nothing is to be generated.",
)


def make_report(report: Report, options: Options, results: Results) -> None:
    """Fill in everything but the checks."""
    _add_targets(report, options, results)
    _add_comparisons(report, results)
    _add_tuning(report, results)
    _add_curves(report, results)
    report.notes += _NOTES
    if results.peers_absent is not None:
        report.notes.append(f"transformers + PEFT: not measured ({results.peers_absent}).")
    report.data = {
        "unloaded_tpot_ms": 1000 * results.unloaded_tpot_s,
        "peer_unloaded_tpot_ms": 1000 * results.peer_unloaded_tpot_s,
        "half_busy_load": results.half_busy_load,
        "trace": options.trace or "drawn",
        "length_scale": options.length_scale,
        "points": [_as_row(results, point) for point in results.points],
    }
    if options.out is not None:
        draw(results, options.out / f"{report.name}.png")


def _as_row(results: Results, point: Point) -> dict[str, object]:
    kept = {"kept_of_peak": results.kept(point), "kept_of_light": results.kept_of_light(point)}
    return {**point.to_dict(), **(kept if point.contender in CONTENDERS else {})}


# ---------------------------------------------------------------- targets


def _add_targets(report: Report, options: Options, results: Results) -> None:
    if options.is_gpu:
        _add_gpu_targets(report, results)
    else:
        _add_cpu_targets(report, results)


def _add_cpu_targets(report: Report, results: Results) -> None:
    load, tight, loose = results.half_busy_load, results.slos[0], results.slos[-1]
    busy = f"inference {results.busy_share(load):.0%} busy"
    for slo in results.slos:
        report.target(
            f"kept of the dedicated peak, {busy}, {slo.name}, ≥ {ATTAINMENT:.0%} attained",
            _kept_if_attained(results, load, slo),
            at_least=0.60,
        )
    report.target(
        f"finetuning over alternating, {busy}, {tight.name}",
        results.gain("alternating", load, tight),
        at_least=1.15,
        unit="x",
    )
    gains = [results.gain("alternating", each, loose) for each in results.loads]
    known = [gain for gain in gains if gain is not None]
    report.target(
        f"finetuning over alternating, worst load, {loose.name}",
        min(known) if known else None,
        at_least=1.0,
        unit="x",
    )
    for rival in ("two processes", "taking turns"):
        for slo in results.slos:
            if results.is_outdone(rival, load, slo):
                report.notes.append(f"Not compared, {busy}, {slo.name}: {rival}, which attain too little.")
                continue
            report.target(
                f"finetuning over {rival} at the same attainment, {busy}, {slo.name}",
                results.gain(rival, load, slo),
                at_least=1.5,
                unit="x",
            )


def _add_gpu_targets(report: Report, results: Results) -> None:
    tight, loose = results.slos[0], results.slos[-1]
    for load in results.loads:
        point = results.find("Weft", load, loose)
        if point is None:
            continue
        at = f"at {load:g} requests/s, {loose.name}"
        if load == results.loads[len(results.loads) // 2]:
            report.ceiling(f"p99 time per token {at}", point.tpot_ms(99.0), at_most=50.0, unit=" ms")
            report.ceiling(f"p99 time to first token {at}", point.ttft_ms(99.0), at_most=5000.0, unit=" ms")
            report.target(f"kept of the dedicated peak {at}", results.kept(point), at_least=0.75)
            report.target(f"kept of light load {at}", results.kept_of_light(point), at_least=0.85)
        if load == results.loads[-1]:
            report.target(f"kept of the dedicated peak {at}", results.kept(point), at_least=0.35)
        idle = 1.0 - results.busy_share(load)
        report.target(
            f"kept {at}, inference alone idle {idle:.0%}", results.kept(point), at_least=0.85 * idle
        )
        report.target(
            f"finetuning over alternating at {load:g} requests/s, {tight.name}",
            results.gain("alternating", load, tight),
            at_least=1.15,
            unit="x",
        )
        report.target(
            f"finetuning over alternating at {load:g} requests/s, {loose.name}",
            results.gain("alternating", load, loose),
            at_least=1.0,
            unit="x",
        )


def _kept_if_attained(results: Results, load: float, slo: Slo) -> float | None:
    point = results.find("Weft", load, slo)
    if point is None:
        return None
    return results.kept(point) if (point.attained(slo) or 0.0) >= ATTAINMENT else 0.0


# ---------------------------------------------------------------- tables


def _add_comparisons(report: Report, results: Results) -> None:
    for load in results.loads:
        for slo in results.slos:
            own = results.find("Weft", load, slo)
            for rival in CONTENDERS[1:]:
                other = results.find(rival, load, slo)
                if own is not None and other is not None:
                    measure = f"finetuned, {load:.2f} requests/s, {slo.name}, {_attained(own, slo)}"
                    name, gain = f"{rival}, {_attained(other, slo)}", results.gain(rival, load, slo)
                    report.compare(measure, "tokens/s", own.trained_per_s, name, other.trained_per_s, gain)


def _add_tuning(report: Report, results: Results) -> None:
    table = report.table(
        "Tuning", ("contender", "tuning", "measured", "chosen"), "Each contender runs at its best."
    )
    for single in (results.weft_tuning, *results.peer_tunings):
        for trial in single.trials:
            chosen = "yes" if trial.candidate == single.best else ""
            table.add(single.contender, str(trial.candidate), trial.note, chosen)
    for pair in results.pair_tunings:
        for both in pair.trials:
            tuning = f"generator {both.candidate[0]}; trainer {both.candidate[1]}"
            table.add(pair.contender, tuning, both.note, "yes" if both.candidate == pair.best else "")


def _add_curves(report: Report, results: Results) -> None:
    busy = ", ".join(f"{results.busy_share(load):.0%} at {load:.2f}/s" for load in results.loads)
    note = (
        f"A token takes {1000 * results.unloaded_tpot_s:.1f} ms unloaded; inference alone is busy {busy}. "
        "Milliseconds are p50 / p95 / p99."
    )
    columns = (
        "requests/s",
        "objective",
        "contender",
        "finetuned tokens/s",
        "kept of peak",
        "kept of light load",
        "attained",
        "ms per token",
        "ms to first token",
        "ms, every gap",
        "generated tokens/s",
    )
    table = report.table("Every window", columns, note)
    for point in results.points:
        for slo in _slos_of(results, point):
            table.add(
                f"{point.requests_per_s:.2f}" if point.requests_per_s else "–",
                "–" if slo is None else slo.name,
                point.contender,
                round(point.trained_per_s, 1),
                _percent(results.kept(point) if point.contender in CONTENDERS else None),
                _percent(results.kept_of_light(point) if point.contender in CONTENDERS else None),
                _percent(None if slo is None else point.attained(slo)),
                _triple([point.tpot_ms(percent) for percent in PERCENTS]),
                _triple([point.ttft_ms(percent) for percent in PERCENTS]),
                _triple([point.gap_ms(percent) for percent in PERCENTS]),
                round(point.generated_per_s, 1),
            )


def _slos_of(results: Results, point: Point) -> Sequence[Slo | None]:
    """The objectives that a window is held against: its own, or all of them."""
    if point.contender not in (*CONTENDERS, "inference alone"):
        return (None,)
    return results.slos if point.slo is None else (point.slo,)


def _attained(point: Point, slo: Slo) -> str:
    return f"{point.attained(slo) or 0.0:.0%} attained"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _triple(values: Sequence[float | None]) -> str:
    return " / ".join("–" if value is None else f"{value:.0f}" for value in values)
