"""A benchmark's report: what ran where, its checks, tables, comparisons and targets, as JSON and Markdown.

Knows nothing of what is measured. `None` as a number means "not measured" throughout.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from weft_server.bench.surroundings import commit, hardware, versions
from weft_server.errors import WeftError

Cell: TypeAlias = str | float | int | None

NOT_MEASURED = "not measured"


class BenchError(WeftError):
    """A benchmark cannot run, or its correctness check failed, so that nothing was timed."""

    default_code = "bench_failed"


@dataclass(frozen=True, slots=True)
class Check:
    """A correctness check that preceded timings.

    `error` is compared with `tolerance`. `error_if_wrong`, where given, is what the same measure says of an
    answer that is wrong on purpose (another adapter's, say); it must exceed the tolerance, so that the check
    can fail.
    """

    what: str
    error: float
    tolerance: float
    error_if_wrong: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance, and a wrong answer's would not be."""
        can_fail = self.error_if_wrong is None or self.error_if_wrong > self.tolerance
        return self.error <= self.tolerance and can_fail


@dataclass(frozen=True, slots=True)
class Comparison:
    """Weft beside one rival in the same run; `ratio` above 1 means that Weft is better."""

    measure: str
    unit: str
    weft: float | None
    rival_name: str
    rival: float | None
    ratio: float | None


@dataclass(frozen=True, slots=True)
class Target:
    """What was aimed at: `measured` at least (or at most) `limit`, in `unit`."""

    text: str
    measured: float | None
    limit: float
    at_least: bool
    unit: str = ""

    @property
    def missed_by(self) -> float | None:
        """How far on the wrong side of the limit, 0 where met; None if not measured."""
        if self.measured is None:
            return None
        gap = self.limit - self.measured
        return max(0.0, gap if self.at_least else -gap)

    @property
    def verdict(self) -> str:
        """`yes`, `no, by …` or `not measured`."""
        missed = self.missed_by
        if missed is None:
            return NOT_MEASURED
        return "yes" if missed == 0.0 else f"no, by {show(missed)}{self.unit}"


@dataclass(slots=True)
class Table:
    """Rows of cells below named columns."""

    title: str
    columns: tuple[str, ...]
    note: str = ""
    rows: list[tuple[Cell, ...]] = field(default_factory=list)

    def add(self, *cells: Cell) -> None:
        """One row.

        Raises:
            ValueError: not one cell for each column.
        """
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for the {len(self.columns)} columns of {self.title!r}")
        self.rows.append(cells)


class Report:
    """Collects one benchmark's results.

    Args:
        name: of the files written, e.g. `decode-bench-200m-cpu`.
        title: the heading.
    """

    def __init__(self, name: str, title: str) -> None:
        self.name = name
        self.title = title
        self.checks: list[Check] = []
        self.comparisons: list[Comparison] = []
        self.targets: list[Target] = []
        self.tables: list[Table] = []
        self.notes: list[str] = []
        self.data: dict[str, Any] = {}
        self._surroundings: dict[str, Any] = {
            "hardware": hardware(),
            "versions": versions(),
            "commit": commit(),
            "command": _command(),
        }
        self._started = datetime.now(UTC)
        self._clock = time.perf_counter()

    def check(self, what: str, error: float, tolerance: float, error_if_wrong: float | None = None) -> None:
        """Record a check, and end the benchmark if it fails.

        Raises:
            BenchError: the check failed.
        """
        check = Check(what, error, tolerance, error_if_wrong)
        self.checks.append(check)
        if not check.passed:
            raise BenchError(
                f"{what}: error {error:.3g}, tolerance {tolerance:.3g}, error of a wrong answer "
                f"{show(error_if_wrong)}. Nothing is timed on a wrong result."
            )

    def table(self, title: str, columns: Sequence[str], note: str = "") -> Table:
        """Begin a table; add its rows to what is returned."""
        table = Table(title, tuple(columns), note)
        self.tables.append(table)
        return table

    def compare(
        self,
        measure: str,
        unit: str,
        weft: float | None,
        rival_name: str,
        rival: float | None,
        ratio: float | None,
    ) -> None:
        """Record one comparison; `ratio` above 1 means that Weft is better."""
        self.comparisons.append(Comparison(measure, unit, weft, rival_name, rival, ratio))

    def target(self, text: str, measured: float | None, *, at_least: float, unit: str = "") -> None:
        """Record a target that is a lower limit."""
        self.targets.append(Target(text, measured, at_least, at_least=True, unit=unit))

    def ceiling(self, text: str, measured: float | None, *, at_most: float, unit: str = "") -> None:
        """Record a target that is an upper limit."""
        self.targets.append(Target(text, measured, at_most, at_least=False, unit=unit))

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {
            "name": self.name,
            "title": self.title,
            **self._surroundings,
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._clock, 1),
            "checks": [{**asdict(check), "passed": check.passed} for check in self.checks],
            "targets": [{**asdict(target), "verdict": target.verdict} for target in self.targets],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "tables": [asdict(table) for table in self.tables],
            "notes": self.notes,
            "data": self.data,
        }

    def to_markdown(self) -> str:
        """Everything but `data`, to be read."""
        parts = [f"# {self.title}", self._header()]
        if self.targets:
            rows = [(t.text, _bound(t), _with_unit(t.measured, t.unit), t.verdict) for t in self.targets]
            parts.append(markdown_table(("target", "limit", "measured", "met"), rows))
        if self.comparisons:
            compared = [(c.measure, c.unit, c.weft, c.rival_name, c.rival, c.ratio) for c in self.comparisons]
            parts.append(
                markdown_table(("measure", "unit", "Weft", "rival", "rival's", "Weft better by"), compared)
            )
        for table in self.tables:
            parts += [f"## {table.title}", *([table.note] if table.note else [])]
            parts.append(markdown_table(table.columns, table.rows))
        if self.checks:
            checked = [
                (c.what, c.error, c.tolerance, "–" if c.error_if_wrong is None else c.error_if_wrong)
                for c in self.checks
            ]
            parts += ["## Checks before timing"]
            parts.append(markdown_table(("what", "error", "tolerance", "error of a wrong answer"), checked))
        parts += [f"- {note}" for note in self.notes]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """Write `NAME.json` and `NAME.md` into the folder, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {folder / f"{self.name}.json": json.dumps(self.to_dict(), indent=1) + "\n"}
        files[folder / f"{self.name}.md"] = self.to_markdown()
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
        return list(files)

    def finish(self, folder: Path | None) -> None:
        """Print the Markdown, and write both files where a folder is given."""
        print(self.to_markdown())
        for path in self.write(folder) if folder is not None else []:
            print(f"written {path}")

    def _header(self) -> str:
        lines = [f"{key}: {_flat(value)}" for key, value in self._surroundings.items()]
        lines.append(f"started: {self._started.isoformat(timespec='seconds')}")
        return "\n".join(f"- {line}" for line in lines)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table in GitHub's Markdown; numbers are right-aligned where a whole column holds numbers."""
    shown = [[show(cell).replace("|", "\\|") for cell in row] for row in rows]
    numeric = [all(not isinstance(row[i], str) for row in rows) for i in range(len(columns))]
    lines = [columns, ["---:" if is_number else "---" for is_number in numeric], *shown]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(cell: Cell) -> str:
    """A cell as text: four significant digits, `not measured` for None."""
    if cell is None:
        return NOT_MEASURED
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 1000 else f"{cell:.4g}" if abs(cell) >= 100 else f"{cell:.3g}"
    return str(cell)


def _bound(target: Target) -> str:
    return f"{'≥' if target.at_least else '≤'} {show(target.limit)}{target.unit}"


def _with_unit(value: float | None, unit: str) -> str:
    return NOT_MEASURED if value is None else f"{show(value)}{unit}"


def _flat(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def _command() -> str:
    """The command line, without the folder of the program."""
    program = Path(sys.argv[0])
    name = "python -m weft_server.bench" if program.name == "__main__.py" else program.name
    return " ".join((name, *sys.argv[1:]))
