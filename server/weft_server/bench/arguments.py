"""The command line of `weft bench PART` and `python -m weft_server.bench PART`.

Imports nothing that computes, so that `weft --help` stays quick: a part's module is imported when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from weft_server.bench.adapters.arguments import add_adapters_arguments
from weft_server.bench.coserve.arguments import add_coserve_arguments
from weft_server.bench.serve.arguments import add_serve_arguments
from weft_server.bench.surroundings import checkout
from weft_server.errors import ConfigError
from weft_server.huge_pages import HUGE_PAGES
from weft_server.number_flags import count, from_zero

AddArguments = Callable[[argparse.ArgumentParser], None]


@dataclass(frozen=True, slots=True)
class Part:
    """One benchmark: its name, one line of help, its flags, and the module whose `run(arguments) -> int` it
    is."""

    name: str
    help: str
    add_arguments: AddArguments
    module: str


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand for each part."""
    parts = parser.add_subparsers(title="parts", metavar="PART", required=True)
    for part in PARTS:
        sub = parts.add_parser(part.name, help=part.help, description=part.help, allow_abbrev=False)
        part.add_arguments(sub)
        sub.set_defaults(run=_runner(part), parser=sub)


def _runner(part: Part) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        _make_folder(arguments.out)
        os.environ.setdefault(*HUGE_PAGES)
        module: Any = importlib.import_module(part.module)
        with _terminated_in_order():
            code: int = module.run(arguments)
        return code

    return run


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """While it is open, SIGTERM ends the program as Ctrl-C does: servers that were started are stopped."""

    def end(_number: int, _frame: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _make_folder(out: Path | None) -> None:
    """Now rather than when minutes of measuring are done.

    Raises:
        ConfigError: it cannot be made, or not be written to.
    """
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out {out}: {error.strerror}; give a folder that can be written, or --no-out"
        ) from error


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """`--out` and `--no-out`, which every part has."""
    root = checkout()
    default = None if root is None else root / "benchmarks" / "results"
    parser.add_argument(
        "--out",
        type=Path,
        default=default,
        metavar="DIR",
        help="write NAME.json and NAME.md here (default: benchmarks/results of a checkout, else nowhere)",
    )
    parser.add_argument("--no-out", dest="out", action="store_const", const=None, help="print only")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Shape, device and dtype of an engine-level part."""
    parser.add_argument(
        "--model",
        metavar="CONFIG",
        help="tiny, bench-200m, bench-1b, llama-3.1-8b, or a config.json or its folder; weights are random "
        "(default: bench-200m on a CPU, llama-3.1-8b on a GPU)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="of computation, for Weft and its peers (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=count, default=0, metavar="N", help="of weights and prompts (default: 0)"
    )


def add_budget_argument(parser: argparse.ArgumentParser) -> None:
    """`--budget-s`, of parts that compare rivals in rounds."""
    parser.add_argument(
        "--budget-s",
        type=from_zero,
        default=20.0,
        metavar="S",
        help="seconds of measuring for each pair of rivals (default: %(default)s)",
    )


def add_quantization_argument(parser: argparse.ArgumentParser) -> None:
    """`--quantization`, of parts that measure one format."""
    parser.add_argument(
        "--quantization",
        choices=("none", "nf4", "int8"),
        help="of the frozen linears (default: none on a CPU, nf4 on a GPU)",
    )


def _engine_part(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_budget_argument(parser)
    add_quantization_argument(parser)
    add_output_arguments(parser)


def _kernels(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_budget_argument(parser)
    add_output_arguments(parser)
    parser.set_defaults(quantization="none")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="operators whose name contains this (default: all)"
    )


def _adapters(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_budget_argument(parser)
    add_adapters_arguments(parser)
    add_output_arguments(parser)
    parser.set_defaults(quantization="none")


def _serve(parser: argparse.ArgumentParser) -> None:
    add_serve_arguments(parser)
    add_output_arguments(parser)


def _coserve(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_quantization_argument(parser)
    add_coserve_arguments(parser)
    add_output_arguments(parser)


PARTS: tuple[Part, ...] = (
    Part(
        "kernels",
        "every operator against its reference, the roofline and other libraries' kernels",
        _kernels,
        "weft_server.bench.kernels.main",
    ),
    Part(
        "decode",
        "generation with several adapters beside PEFT, cost of adapters, share of bandwidth",
        _engine_part,
        "weft_server.bench.decode",
    ),
    Part(
        "prefill",
        "prompts with several adapters beside PEFT, cost of adapters",
        _engine_part,
        "weft_server.bench.prefill",
    ),
    Part(
        "train", "whole finetuning steps beside PEFT, bytes a token", _engine_part, "weft_server.bench.train"
    ),
    Part(
        "adapters",
        "an adapter's load from disk, Redis and host memory, cold and warm, by stage",
        _adapters,
        "weft_server.bench.adapters.main",
    ),
    Part(
        "serve",
        "open-loop load over HTTP: latencies, goodput, errors, with finetune jobs or without",
        _serve,
        "weft_server.bench.serve.main",
    ),
    Part(
        "coserve",
        "finetuning kept beside inference, against alternating iterations and two PEFT processes",
        _coserve,
        "weft_server.bench.coserve.main",
    ),
    Part(
        "engine", "decode, prefill and train, one after the other", _engine_part, "weft_server.bench.engine"
    ),
)
"""What there is to measure. What a part needs beyond the engine's libraries, its own module imports."""
