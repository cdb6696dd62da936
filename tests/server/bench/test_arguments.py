"""The command line of the benchmarks, and its page."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest

from weft_server import cli
from weft_server.bench.arguments import PARTS, add_bench_arguments

PAGE = Path(__file__).parents[3] / "docs" / "benchmarks.md"


def flags_of(part: str) -> set[str]:
    parser = argparse.ArgumentParser()
    add_bench_arguments(parser)
    parsed = parser.parse_args([part])
    return {name for name in parsed.parser._option_string_actions if name.startswith("--")} - {"--help"}


@pytest.mark.parametrize("part", [part.name for part in PARTS])
def test_every_part_and_flag_is_documented(part: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert f"`{part}`" in page
    assert {flag for flag in flags_of(part) if f"`{flag}" not in page} == set()


@pytest.mark.parametrize("part", PARTS, ids=[part.name for part in PARTS])
def test_every_part_can_be_run(part: object) -> None:
    module = importlib.import_module(part.module)  # type: ignore[attr-defined]
    assert callable(module.run)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "kernel"], "invalid choice: 'kernel'"),
        (["bench", "decode", "--modle", "tiny"], "unknown option '--modle'. Did you mean --model?"),
        (["bench"], "required: PART"),
    ],
)
def test_wrong_usage_is_answered_with_what_is_allowed(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_an_unknown_model_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "decode", "--model", "huge", "--no-out"]) == 2
    assert "--model is 'huge', neither" in capsys.readouterr().err


def test_an_operator_that_does_not_exist_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernels", "--model", "tiny", "--only", "conv", "--no-out"]) == 1
    assert "--only 'conv' is in the name of no operator" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["decode", "--budget-s", "-1"], ("'-1'", "a number from 0")),
        (["coserve", "--seconds", "0"], ("'0'", "above 0")),
        (["coserve", "--adapters", "none"], ("'none'", "from 1")),
        (["serve", "--tenants", "0"], ("'0'", "from 1")),
        (["serve", "--model", "tiny", "--jobs", "1", "--no-out"], ("--jobs", "tiny has 512", "demo")),
        (["serve", "--rate", "1e9", "--no-out"], ("--rate", "at most 100000")),
        (["serve", "--adapter-rank", "257", "--no-out"], ("--adapter-rank 257", "256")),
        (["coserve", "--model", "tiny", "--trace", "nosuch.csv", "--no-out"], ("--trace", "no such file")),
        (["coserve", "--model", "tiny", "--loads", "1,1e9", "--no-out"], ("--loads 1e+09", "at most 100000")),
        (["serve", "--trace", "nosuch.csv", "--no-out"], ("--trace", "nosuch.csv", "no such file")),
        (["decode", "--out", "/proc/nowhere"], ("--out /proc/nowhere", "--no-out")),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = cli.main(["bench", *arguments])
    except SystemExit as ended:
        code = ended.code
    message = capsys.readouterr().err
    assert code == 2
    assert all(word in message for word in words), message


def test_a_server_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "serve", "--url", "http://127.0.0.1:1", "--no-out"]) == 1
    assert "no server answers at http://127.0.0.1:1" in capsys.readouterr().err
