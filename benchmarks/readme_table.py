"""Writes the benchmark tables of README.md and of benchmarks/results/README.md from the committed reports.

    python benchmarks/readme_table.py [--check] [--results DIR]

The README gets one row for each thing that was compared, beside the fastest rival; every target that is
missed; and what has no result. The page in the results' folder has all rivals, all targets, every command.
Reports are the JSON files that `weft bench` writes; other files there are left alone. Needs Python alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

Report: TypeAlias = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
CPU_PARTS = ("decode", "prefill", "train", "coserve", "adapters", "kernels", "serve")
GPU_PARTS = ("decode", "prefill", "train", "coserve", "adapters", "kernels")
GPU_MODEL = "llama-3.1-8b"
NOT_MEASURED = "not measured"
AS_FAST = 0.95
"""A ratio that two timings of the same code differ by."""


def read_reports(folder: Path) -> list[Report]:
    """The reports of a folder: what runs on a CPU first, in the order of the parts."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    reports = [
        content
        for content in contents
        if isinstance(content, dict) and {"comparisons", "targets", "hardware"} <= content.keys()
    ]
    return sorted(reports, key=lambda report: (_is_gpu(report), _place(_part(report)), report["name"]))


def readme_block(reports: Sequence[Report], folder: str = "benchmarks/results") -> str:
    """What stands between the README's markers.

    Args:
        folder: of the reports, as links in the README name it.
    """
    parts = [
        _table(
            ("on", "what", "Weft", "fastest rival", "rival's", "Weft better by"),
            [row for report in reports for row in _best_comparisons(report)],
        ),
        _operators(reports),
        _over_http(reports),
        _missed(reports),
        _absent(reports),
        _machines(reports),
        f"Every rival, target, setting and command: [`{folder}`]({folder}/README.md).",
    ]
    return "\n\n".join(part for part in parts if part)


def results_page(reports: Sequence[Report], others: Sequence[str]) -> str:
    """`README.md` of the results' folder.

    Args:
        others: names of pages there that are no report's.
    """
    rivals = _table(
        ("on", "what", "Weft", "rival", "rival's", "Weft better by"),
        [_comparison(report, item) for report in reports for item in report["comparisons"]],
    )
    targets = _table(
        ("on", "target", "limit", "measured", "met"),
        [(_on(report), *_target(item)) for report in reports for item in report["targets"]],
    )
    parts = [
        "# Results",
        "Made by `make bench-table` from the reports beside this page; `docs/benchmarks.md` says how they "
        "are measured. Bold is what Weft loses or misses. Operators, one by one, are in the reports of "
        "`kernels`.",
        *_section("Beside rivals", rivals, _operators(reports)),
        *_section("Targets", targets),
        *_section("Load over HTTP", _over_http(reports)),
        *_section("What ran where", _sources(reports), _absent(reports)),
        *_section("More", "\n".join(f"- [{name}]({name})" for name in others)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def with_block(readme: str, text: str) -> str:
    """The README with `text` between its markers.

    Raises:
        ValueError: it does not have both markers, in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _best_comparisons(report: Report) -> list[tuple[str, ...]]:
    """One row for each measure: beside the rival that Weft is better by least."""
    by_measure: dict[str, list[dict[str, Any]]] = {}
    for item in report["comparisons"]:
        by_measure.setdefault(item["measure"], []).append(item)
    rows = []
    for items in by_measure.values():
        known = [item for item in items if item["ratio"] is not None]
        rows.append(_comparison(report, min(known, key=lambda item: item["ratio"]) if known else items[0]))
    return rows


def _comparison(report: Report, item: dict[str, Any]) -> tuple[str, ...]:
    return (
        _on(report),
        item["measure"],
        _with_unit(item["weft"], f" {item['unit']}"),
        item["rival_name"],
        _with_unit(item["rival"], f" {item['unit']}"),
        _ratio(item["ratio"]),
    )


def _operators(reports: Iterable[Report]) -> str:
    """A line for each report on operators."""
    lines = []
    for report in reports:
        rows = report.get("data", {}).get("operators", [])
        if not rows:
            continue
        share = median(row["roofline_us"] / row["weft_us"] for row in rows)
        beside = [
            (ratio, row, peer) for row in rows for peer, ratio in row["peers"].items() if ratio is not None
        ]
        slower = sorted((found for found in beside if found[0] < AS_FAST), key=lambda found: found[0])
        line = f"Operators, {_on(report)}: {100 * share:.0f} % of the roofline in the median of "
        line += f"{len(rows)} cases"
        if beside:
            line += f"; as fast as the peer or faster in {len(beside) - len(slower)} of {len(beside)}"
        if slower:
            worst, row, peer = slower[0]
            line += f", slowest **{worst:.2f}x** ({row['op']}, {row['shape']}, beside {peer})"
        lines.append(f"{line}.")
    return "\n".join(lines)


def _over_http(reports: Iterable[Report]) -> str:
    rows = []
    for report in reports:
        phases = {phase["name"]: phase for phase in report.get("data", {}).get("phases", [])}
        if "requests alone" not in phases:
            continue
        alone, both = phases["requests alone"], phases.get("both", {})
        trained = phases.get("finetuning alone", {}).get("trained_per_s")
        loads = [alone["load"], both.get("load")]
        rows.append(
            (
                f"`{report['name']}`",
                _each(loads, "ttft_ms", ".0f"),
                _each(loads, "tpot_ms", ".1f"),
                " → ".join("–" if load is None else f"{load['attained']:.0%}" for load in loads),
                f"{_rate(trained)} → {_rate(both.get('trained_per_s'))}",
            )
        )
    columns = (
        "over HTTP: alone → with finetune jobs",
        "ms to first token, p50 / p99",
        "ms per token, p50 / p99",
        "objective attained",
        "finetuned tokens/s: alone → with requests",
    )
    return _table(columns, rows)


def _each(loads: Sequence[dict[str, Any] | None], key: str, form: str) -> str:
    values = [None if load is None else load[key] for load in loads]
    return " → ".join("–" if value is None else f"{value[0]:{form}} / {value[2]:{form}}" for value in values)


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _missed(reports: Sequence[Report]) -> str:
    """Every target that is missed, and how many are not."""
    items = [(_on(report), item) for report in reports for item in report["targets"]]
    if not items:
        return ""
    known = [(on, item) for on, item in items if item["measured"] is not None]
    missed = [(on, *_target(item)) for on, item in known if item["verdict"] != "yes"]
    text = f"Targets: {len(known) - len(missed)} of {len(items)} met"
    if len(known) < len(items):
        text += f", {len(items) - len(known)} {NOT_MEASURED}"
    if not missed:
        return f"{text}."
    return f"{text}. Missed:\n\n{_table(('on', 'target', 'limit', 'measured', 'met'), missed)}"


def _target(item: dict[str, Any]) -> tuple[str, ...]:
    return (
        item["text"],
        f"{'≥' if item['at_least'] else '≤'} {_number(item['limit'])}{item['unit']}",
        _with_unit(item["measured"], item["unit"]),
        item["verdict"] if item["verdict"] in ("yes", NOT_MEASURED) else f"**{item['verdict']}**",
    )


def _absent(reports: Sequence[Report]) -> str:
    """Parts without a result."""
    measured = {(_part(report), _is_gpu(report), _model(report)) for report in reports}
    on_cpu = [part for part in CPU_PARTS if not any(found[:2] == (part, False) for found in measured)]
    on_gpu = [part for part in GPU_PARTS if (part, True, GPU_MODEL) not in measured]
    lines = []
    if on_cpu:
        lines.append(
            f"- On a CPU {NOT_MEASURED}: {', '.join(on_cpu)} "
            "(`make bench bench-serve`, `make bench BENCH_PARTS=coserve`)."
        )
    if on_gpu:
        lines.append(
            f"- On a GPU ({GPU_MODEL}, NF4) {NOT_MEASURED}: {', '.join(on_gpu)} (`make bench-gpu PART=…`)."
        )
    return "\n".join(lines)


def _sources(reports: Sequence[Report]) -> str:
    rows = [
        (
            f"[`{report['name']}`]({report['name']}.md)",
            report["started"][:10],
            _machine(report),
            f"`{report['commit']}`",
            f"`{report['command']}`",
        )
        for report in reports
    ]
    return _table(("report", "date", "machine", "commit", "command"), rows)


def _machines(reports: Iterable[Report]) -> str:
    found = sorted({_machine(report) for report in reports})
    return f"Measured on: {'; '.join(found)}." if found else ""


def _machine(report: Report) -> str:
    hardware = report["hardware"]
    cpu = f"{hardware['cpu']}, {hardware['cores']} cores"
    device = hardware["gpu"]["name"] if _is_gpu(report) and "gpu" in hardware else cpu
    return f"{device}, torch {report['versions']['torch']}"


def _on(report: Report) -> str:
    """Model and kind of device; and whether the run was a short one, which says little."""
    quick = ", quick run of few requests" if "--quick" in report["command"].split() else ""
    return f"{_model(report)}, {'GPU' if _is_gpu(report) else 'CPU'}{quick}"


def _part(report: Report) -> str:
    return str(report["name"]).partition("-")[0]


def _place(part: str) -> int:
    return CPU_PARTS.index(part) if part in CPU_PARTS else len(CPU_PARTS)


def _model(report: Report) -> str:
    """A report is named after part, model and kind of device."""
    return str(report["name"]).partition("-")[2].removesuffix("-cpu").removesuffix("-gpu")


def _is_gpu(report: Report) -> bool:
    return str(report["name"]).endswith("-gpu")


def _section(title: str, *parts: str) -> list[str]:
    """A heading and what is below it; nothing where that is empty."""
    return [f"## {title}", *parts] if any(parts) else []


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [columns, ["---"] * len(columns), *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _with_unit(value: float | None, unit: str) -> str:
    return NOT_MEASURED if value is None else f"{_number(value)}{unit}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    if value == 0.0:
        return "**0** (fewer requests attained)"
    return f"{value:.2f}x" if value >= 1.0 else f"**{value:.2f}x**"


def pages(readme: str, results: Path) -> dict[Path, str]:
    """Both pages as they should be, by path.

    Raises:
        ValueError: the README lacks its markers.
    """
    reports = read_reports(results)
    own = {f"{report['name']}.md" for report in reports} | {"README.md"}
    others = sorted(path.name for path in results.glob("*.md") if path.name not in own)
    return {
        ROOT / "README.md": with_block(readme, readme_block(reports)),
        results / "README.md": results_page(reports, others),
    }


def main() -> int:
    """Write both pages; with `--check` only say whether they are up to date, with `--results` print the
    tables of another folder's reports."""
    parser = argparse.ArgumentParser(description="The benchmark tables of README.md and benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if out of date")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="print the README's tables for the reports of this folder, and write nothing",
    )
    arguments = parser.parse_args()
    if arguments.results is not None:
        print(readme_block(read_reports(arguments.results)))
        return 0
    wanted = pages((ROOT / "README.md").read_text(encoding="utf-8"), RESULTS)
    stale = [
        path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if arguments.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: run `make bench-table`", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
        print(f"written {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
