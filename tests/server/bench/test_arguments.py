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
