"""The README's benchmark tables are those that the committed results make."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from weft_server.bench.report import Report


@pytest.fixture(scope="module")
def readme_table(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_table", root / "benchmarks" / "readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_up_to_date_with_the_results(root: Path, readme_table: ModuleType) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    reports = readme_table.read_reports(root / "benchmarks" / "results")
    assert readme_table.with_tables(readme, readme_table.tables(reports)) == readme, "run `make bench-table`"


@pytest.fixture
def reports(tmp_path: Path, readme_table: ModuleType) -> list[dict[str, Any]]:
    """A report of one row that Weft loses, beside a file that is no report."""
    report = Report("decode-tiny-cpu", "Generation")
    report.data["setting"] = {"model": "tiny"}
    report.compare("decode", "tokens/s", 90.0, "the rival", 100.0, 0.9)
    report.compare("decode", "tokens/s", 90.0, "an absent rival", None, None)
    report.target("as fast", 0.9, at_least=1.0, unit="x")
    report.write(tmp_path)
    (tmp_path / "other.json").write_text(json.dumps({"command": []}))
    found: list[dict[str, Any]] = readme_table.read_reports(tmp_path)
    return found


def test_rows_that_weft_loses_are_shown(reports: list[dict[str, Any]], readme_table: ModuleType) -> None:
    text = readme_table.tables(reports)
    assert "| tiny, CPU | decode, tokens/s | 90 | the rival | 100 | **0.90x** |" in text
    assert "| tiny, CPU | decode, tokens/s | 90 | an absent rival | not measured | not measured |" in text
    assert "| tiny, CPU | as fast | ≥ 1x | 0.9x | **no, by 0.1x** |" in text


def test_what_no_gpu_has_measured_is_named(reports: list[dict[str, Any]], readme_table: ModuleType) -> None:
    assert "not measured: kernels, decode, prefill, train, coserve" in readme_table.tables(reports)
    on_gpu = [{**reports[0], "name": "train-llama-3.1-8b-gpu"}]
    assert "not measured: kernels, decode, prefill, coserve" in readme_table.tables(on_gpu)


def test_a_readme_without_markers_is_refused(readme_table: ModuleType) -> None:
    with pytest.raises(ValueError, match="lacks"):
        readme_table.with_tables("# Weft", "a table")
