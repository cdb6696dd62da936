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


def test_both_pages_are_up_to_date_with_the_results(root: Path, readme_table: ModuleType) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    for path, text in readme_table.pages(readme, root / "benchmarks" / "results").items():
        assert path.read_text(encoding="utf-8") == text, "run `make bench-table`"


@pytest.fixture
def reports(tmp_path: Path, readme_table: ModuleType) -> list[dict[str, Any]]:
    """Reports with rows that Weft loses, beside a file that is no report."""
    report = Report("decode-tiny-cpu", "Generation")
    report.compare("decode", "tokens/s", 90.0, "a slow rival", 45.0, 2.0)
    report.compare("decode", "tokens/s", 90.0, "the rival", 100.0, 0.9)
    report.compare("decode", "tokens/s", 90.0, "an absent rival", None, None)
    report.compare("tokens at an objective", "tokens/s", 90.0, "alternating", 80.0, 0.0)
    report.target("as fast", 0.9, at_least=1.0, unit="x")
    report.target("half as fast", 0.9, at_least=0.5, unit="x")
    report.target("on other hardware", None, at_least=0.5, unit="x")
    report.write(tmp_path)
    kernels = Report("kernels-tiny-cpu", "Operators")
    rows = [("linear", 50.0, {"torch": 1.2}), ("norm", 20.0, {"torch": 0.7}), ("rope", 10.0, {"vLLM": None})]
    kernels.data["operators"] = [
        {"op": op, "shape": "8 rows", "weft_us": 100.0, "roofline_us": roofline, "peers": peers}
        for op, roofline, peers in rows
    ]
    kernels.write(tmp_path)
    (tmp_path / "other.json").write_text(json.dumps({"command": []}))
    found: list[dict[str, Any]] = readme_table.read_reports(tmp_path)
    assert [one["name"] for one in found] == ["decode-tiny-cpu", "kernels-tiny-cpu"]
    return found


def test_a_quick_run_says_so_in_every_row(reports: list[dict[str, Any]], readme_table: ModuleType) -> None:
    assert "quick run" not in readme_table.readme_block(reports)
    reports[0]["command"] += " --quick"
    text = readme_table.readme_block(reports)
    assert "| tiny, CPU, quick run of few requests | decode |" in text
    assert "| tiny, CPU, quick run of few requests | as fast |" in text


def test_the_readme_shows_the_fastest_rival_of_each_measure(
    reports: list[dict[str, Any]], readme_table: ModuleType
) -> None:
    text = readme_table.readme_block(reports)
    assert "| tiny, CPU | decode | 90 tokens/s | the rival | 100 tokens/s | **0.90x** |" in text
    assert "slow rival" not in text
    assert "| alternating | 80 tokens/s | **0** (fewer requests attained) |" in text


def test_the_readme_shows_every_missed_target_and_counts_the_others(
    reports: list[dict[str, Any]], readme_table: ModuleType
) -> None:
    text = readme_table.readme_block(reports)
    assert "Targets: 1 of 3 met, 1 not measured. Missed:" in text
    assert "| tiny, CPU | as fast | ≥ 1x | 0.9x | **no, by 0.1x** |" in text
    assert "half as fast" not in text


def test_operators_are_a_line_that_names_the_slowest(
    reports: list[dict[str, Any]], readme_table: ModuleType
) -> None:
    assert (
        "Operators, tiny, CPU: 20 % of the roofline in the median of 3 cases; as fast as the peer or faster "
        "in 1 of 2, slowest **0.70x** (norm, 8 rows, beside torch)."
    ) in readme_table.readme_block(reports)


def test_the_page_of_results_has_every_row_and_command(
    reports: list[dict[str, Any]], readme_table: ModuleType
) -> None:
    text = readme_table.results_page(reports, ["policies.md"])
    for row in (
        "| tiny, CPU | decode | 90 tokens/s | a slow rival | 45 tokens/s | 2.00x |",
        "| tiny, CPU | decode | 90 tokens/s | an absent rival | not measured | not measured |",
        "| tiny, CPU | on other hardware | ≥ 0.5x | not measured | not measured |",
        "- [policies.md](policies.md)",
        f"`{reports[0]['command']}`",
    ):
        assert row in text


def test_a_load_over_http_is_a_row_with_and_without_jobs(readme_table: ModuleType, tmp_path: Path) -> None:
    report = Report("serve-demo-cpu", "Load over HTTP")
    load = {"ttft_ms": [50.0, 90.0, 160.0], "tpot_ms": [5.0, 7.0, 8.0], "attained": 1.0}
    slower = {"ttft_ms": [60.0, 90.0, 260.0], "tpot_ms": None, "attained": 0.5}
    report.data["phases"] = [
        {"name": "requests alone", "trained_per_s": None, "load": load},
        {"name": "finetuning alone", "trained_per_s": 2000.0, "load": None},
        {"name": "both", "trained_per_s": 1000.0, "load": slower},
    ]
    report.write(tmp_path)
    text = readme_table.readme_block(readme_table.read_reports(tmp_path))
    assert "| 50 / 160 → 60 / 260 | 5.0 / 8.0 → – | 100% → 50% | 2000 → 1000 |" in text


def test_what_nothing_has_measured_is_named(reports: list[dict[str, Any]], readme_table: ModuleType) -> None:
    text = readme_table.readme_block(reports)
    assert "On a CPU not measured: prefill, train, coserve, adapters, serve (" in text
    assert "not measured: decode, prefill, train, coserve, adapters, kernels (" in text
    on_gpu = [{**reports[0], "name": "train-llama-3.1-8b-gpu"}]
    assert "not measured: decode, prefill, coserve, adapters, kernels (" in readme_table.readme_block(on_gpu)


def test_a_readme_without_markers_is_refused(readme_table: ModuleType) -> None:
    with pytest.raises(ValueError, match="lacks"):
        readme_table.with_block("# Weft", "a table")
