"""Writes the README's benchmark tables from the reports in `benchmarks/results`.

    python benchmarks/readme_table.py [--check]

Every comparison and every target of every report becomes a row, those that Weft loses or misses included.
Reports are the JSON files that `weft bench` writes; other files there are left alone. Needs Python alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
EXPECTED_ON_GPU = ("kernels", "decode", "prefill", "train", "coserve")
GPU_MODEL = "llama-3.1-8b"
NOT_MEASURED = "not measured"


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """The reports of a folder, by name."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [
        content
        for content in contents
        if isinstance(content, dict) and {"comparisons", "targets", "hardware"} <= content.keys()
    ]


def tables(reports: Sequence[dict[str, Any]]) -> str:
    """What stands between the markers."""
    parts = [_comparisons(reports), _targets(reports), _missing(reports), _sources(reports)]
    return "\n\n".join(part for part in parts if part)


def with_tables(readme: str, text: str) -> str:
    """The README with `text` between its markers.

    Raises:
        ValueError: it does not have both markers, in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _comparisons(reports: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            _subject(report),
            f"{item['measure']}, {item['unit']}",
            _number(item["weft"]),
            item["rival_name"],
            _number(item["rival"]),
            _ratio(item["ratio"]),
        )
        for report in reports
        for item in report["comparisons"]
    ]
    return _table(("on", "measure", "Weft", "rival", "rival's", "Weft better by"), rows)


def _targets(reports: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            _subject(report),
            item["text"],
            f"{'≥' if item['at_least'] else '≤'} {_number(item['limit'])}{item['unit']}",
            NOT_MEASURED if item["measured"] is None else f"{_number(item['measured'])}{item['unit']}",
            item["verdict"] if item["verdict"] == "yes" else f"**{item['verdict']}**",
        )
        for report in reports
        for item in report["targets"]
    ]
    return _table(("on", "target", "limit", "measured", "met"), rows)


def _missing(reports: Sequence[dict[str, Any]]) -> str:
    """Parts without a result on a GPU."""
    names = {report["name"] for report in reports}
    missing = [part for part in EXPECTED_ON_GPU if f"{part}-{GPU_MODEL}-gpu" not in names]
    if not missing:
        return ""
    return f"On a GPU ({GPU_MODEL}, NF4) {NOT_MEASURED}: {', '.join(missing)} (`make bench-gpu PART=…`)."


def _sources(reports: Sequence[dict[str, Any]]) -> str:
    lines = []
    for report in reports:
        machine = report["hardware"]
        device = machine["gpu"]["name"] if "gpu" in machine else f"{machine['cpu']}, {machine['cores']} cores"
        lines.append(
            f"- [`{report['name']}`](benchmarks/results/{report['name']}.md): {device}; "
            f"torch {report['versions']['torch']}; commit `{report['commit']}`; `{report['command']}`"
        )
    return "\n".join(lines)


def _subject(report: dict[str, Any]) -> str:
    """Model and kind of device: the report's name without its part."""
    setting = report.get("data", {}).get("setting", {})
    model = setting.get("model", report["name"])
    return f"{model}, {'GPU' if 'gpu' in report['hardware'] and report['name'].endswith('gpu') else 'CPU'}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [columns, ["---"] * len(columns), *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:.2f}x" if value >= 1.0 else f"**{value:.2f}x**"


def main() -> int:
    """Write the README, or with `--check` only say whether it is up to date."""
    parser = argparse.ArgumentParser(description="The README's benchmark tables from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if out of date")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    updated = with_tables(readme, tables(read_reports(ROOT / "benchmarks" / "results")))
    if arguments.check:
        if updated != readme:
            print("README.md is out of date: run `python benchmarks/readme_table.py`", file=sys.stderr)
        return int(updated != readme)
    path.write_text(updated, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
