"""The command line: `weft serve`, `weft demo`, `weft keys new`, `weft simulate`, `weft bench`.

Owns flags and exit codes (0 done, 1 failed at run time, 2 usage or configuration, 130 interrupted).
Everything else is imported when a command needs it, so that `weft --help` stays quick.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from weft_server import __version__
from weft_server.bench.arguments import add_bench_arguments
from weft_server.config import CONFIG_ENV, OPTIONS, Option, load_settings
from weft_server.errors import ConfigError, WeftError
from weft_server.simulate.arguments import add_simulate_arguments

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_PRECEDENCE = (
    "Each option may also be a variable (WEFT_PORT) or a TOML key (port); flag > variable > file > default."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Usage errors raise SystemExit(2), as argparse does."""
    arguments, unknown = build_parser().parse_known_args(argv)
    if unknown:
        _refuse(arguments.parser, unknown)
    try:
        code: int = arguments.run(arguments)
    except ConfigError as error:
        print(f"weft: {error.message}", file=sys.stderr)
        return EXIT_USAGE
    except WeftError as error:
        print(f"weft: {error.message}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return code


def _refuse(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    """End with the command's usage, what it does not know, and the options that are meant or allowed."""
    flag = next((argument.partition("=")[0] for argument in unknown if argument.startswith("-")), None)
    if flag is None:
        parser.error(f"unexpected argument '{unknown[0]}'")
    options = [name for name in parser._option_string_actions if name.startswith("--")]
    close = difflib.get_close_matches(flag, options, n=1, cutoff=0.75)
    hint = f"Did you mean {close[0]}?" if close else f"Allowed: {', '.join(options)}."
    parser.error(f"unknown option '{flag}'. {hint}")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; the options come from `config.OPTIONS`."""
    parser = argparse.ArgumentParser(
        prog="weft",
        description="Co-serves inference and LoRA finetuning of many tenants from one frozen base model.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"weft {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    serve = commands.add_parser(
        "serve",
        help="serve a model over the OpenAI API",
        description=f"Serve a model over the OpenAI API. {_PRECEDENCE}",
        allow_abbrev=False,
    )
    serve.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="Hugging Face directory, hub id, or demo (the bundled model)",
    )
    _add_options(serve)
    serve.set_defaults(run=_serve, parser=serve)

    demo = commands.add_parser(
        "demo",
        help="show co-serving with the bundled model",
        description="Serve the bundled model, finetune adapters while it answers, and show the result.",
        allow_abbrev=False,
    )
    demo.add_argument("--exit", action="store_true", dest="exit_when_done", help="end when the demo is over")
    _add_options(demo)
    demo.set_defaults(run=_demo, parser=demo)

    keys = commands.add_parser("keys", help="manage API keys", allow_abbrev=False)
    new = keys.add_subparsers(title="commands", metavar="COMMAND", required=True).add_parser(
        "new",
        help="make an API key",
        description="Make an API key: prints it once, and the --api-keys lines that hold its digest.",
        allow_abbrev=False,
    )
    new.add_argument(
        "--tenant", default="my-tenant", metavar="NAME", help="name in the lines (default: %(default)s)"
    )
    new.add_argument("--admin", action="store_true", help="give the tenant admin rights (/metrics)")
    new.set_defaults(run=_new_key, parser=new)

    simulate = commands.add_parser(
        "simulate",
        help="replay a trace through the scheduler without a GPU",
        description="Replay a trace of requests, with finetune jobs beside it, through the scheduler on a "
        "simulated device: latencies, attainment, finetuning tokens/s, fairness, and how many GPUs it takes.",
        allow_abbrev=False,
    )
    add_simulate_arguments(simulate)
    simulate.set_defaults(run=_simulate, parser=simulate)

    bench = commands.add_parser(
        "bench",
        help="measure kernels, engine and server",
        description="Measure Weft: correctness first, then times against ceilings, peers and targets.",
        allow_abbrev=False,
    )
    add_bench_arguments(bench)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help=f"TOML file of options (or {CONFIG_ENV})")
    for option in OPTIONS:
        if option.name == "model":
            continue
        if option.is_switch:
            parser.add_argument(option.flag, action="store_true", default=None, help=option.help)
        else:
            parser.add_argument(option.flag, metavar=_metavar(option), help=_help(option))


def _metavar(option: Option) -> str:
    return option.name.rsplit("_", 1)[-1].upper()


def _help(option: Option) -> str:
    text = option.help if option.default is None else f"{option.help} (default: {option.default})"
    return text.replace("%", "%%")


def _flags(arguments: argparse.Namespace) -> dict[str, object]:
    return {option.name: getattr(arguments, option.name, None) for option in OPTIONS}


def _serve(arguments: argparse.Namespace) -> int:
    settings = load_settings(_flags(arguments), config=arguments.config)
    from weft_server.serving import serve

    return serve(settings)


def _demo(arguments: argparse.Namespace) -> int:
    settings = load_settings({**_flags(arguments), "model": "demo"}, config=arguments.config)
    from weft_server.demo.main import run_demo

    return run_demo(settings, exit_when_done=arguments.exit_when_done)


def _simulate(arguments: argparse.Namespace) -> int:
    from weft_server.simulate.main import run_simulate

    return run_simulate(arguments)


def _new_key(arguments: argparse.Namespace) -> int:
    from weft_server.service.tenants import check_tenant_name, new_key

    check_tenant_name("--tenant", arguments.tenant)
    key = new_key()
    print(f"API key (shown once): {key.secret}")
    print("\nLines for the --api-keys file (for an existing tenant, add the digest to its keys):\n")
    print("[[tenants]]")
    print(f"name = {json.dumps(arguments.tenant)}")
    if arguments.admin:
        print("admin = true")
    print(f'keys = ["{key.digest}"]')
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
