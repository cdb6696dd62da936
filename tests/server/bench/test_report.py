"""Reports: checks that end a benchmark, verdicts on targets, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weft_server.bench.report import NOT_MEASURED, BenchError, Report, Target, markdown_table


@pytest.fixture
def report() -> Report:
    return Report("part-model-cpu", "A title")


def test_a_check_beyond_its_tolerance_ends_the_benchmark(report: Report) -> None:
    report.check("close", 0.01, 0.02)
    with pytest.raises(BenchError, match=r"logits: error 0\.03, tolerance 0\.02"):
        report.check("logits", 0.03, 0.02)


def test_a_check_that_a_wrong_answer_passes_ends_the_benchmark_too(report: Report) -> None:
    report.check("logits", 0.01, 0.02, error_if_wrong=0.5)
    with pytest.raises(BenchError, match=r"error of a wrong answer 0\.015"):
        report.check("logits", 0.01, 0.02, error_if_wrong=0.015)


def test_a_nan_is_no_success(report: Report) -> None:
    with pytest.raises(BenchError):
        report.check("logits", float("nan"), 0.02)


@pytest.mark.parametrize(
    ("measured", "at_least", "verdict"),
    [
        (1.5, True, "yes"),
        (1.4, True, "yes"),
        (1.15, True, "no, by 0.25x"),
        (1.15, False, "yes"),
        (1.65, False, "no, by 0.25x"),
        (None, True, NOT_MEASURED),
    ],
)
def test_a_target_says_by_how_much_it_is_missed(measured: float | None, at_least: bool, verdict: str) -> None:
    assert Target("speed", measured, 1.4, at_least, "x").verdict == verdict


def test_everything_recorded_is_written(report: Report, tmp_path: Path) -> None:
    report.check("logits", 0.01, 0.02, 0.5)
    report.compare("decode", "tokens/s", 100.0, "the rival", 200.0, 0.5)
    report.compare("prefill", "tokens/s", 100.0, "absent", None, None)
    report.target("fast", 0.5, at_least=1.4, unit="x")
    report.ceiling("small", 3.0, at_most=2.0, unit=" ms")
    report.table("Rates", ("what", "rate"), "A note.").add("a|b", 1234.5)
    json_path, markdown_path = report.write(tmp_path / "new")
    content = json.loads(json_path.read_text())
    assert json_path.name == "part-model-cpu.json"
    assert content["checks"][0]["passed"] is True
    assert [target["verdict"] for target in content["targets"]] == ["no, by 0.9x", "no, by 1 ms"]
    assert content["comparisons"][0]["ratio"] == 0.5
    assert {"cpu", "cores", "instruction_sets"} <= content["hardware"].keys()
    assert {"python", "torch"} <= content["versions"].keys()
    assert content["commit"]
    assert content["command"]
    text = markdown_path.read_text()
    for row in (
        "| fast | ≥ 1.4x | 0.5x | no, by 0.9x |",
        "| decode | tokens/s | 100 | the rival | 200 | 0.5 |",
        "| prefill | tokens/s | 100 | absent | not measured | not measured |",
        r"| a\|b | 1234 |",
    ):
        assert row in text


def test_a_row_that_does_not_fit_its_table_is_refused(report: Report) -> None:
    with pytest.raises(ValueError, match="1 cells for the 2 columns"):
        report.table("Rates", ("what", "rate")).add("one")


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    assert markdown_table(("a", "b"), [("x", 1.0), ("y", None)]).splitlines()[1] == "| --- | ---: |"
