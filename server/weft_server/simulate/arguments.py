"""The options of `weft simulate`: flags, and the small languages of `--jobs`, `--slo` and `--weights`.

Imports nothing that draws or computes, so that `weft --help` stays quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from weft_scheduler.simulator.gpus import GPUS
from weft_scheduler.simulator.jobs import JobSpec
from weft_scheduler.simulator.report import Slo
from weft_scheduler.simulator.shapes import SHAPES, WEIGHT_BYTES
from weft_server.errors import ConfigError
from weft_server.number_flags import count, from_zero, positive, whole_from

POLICY_NAMES = ("weft", "static-cap", "alternating", "no-coserving")
_JOB_KEYS = ("batch", "tokens", "max_tokens", "steps", "rank", "tenants")
_SLO_KEYS = ("tpot", "ttft", "percentile")
MAX_REPLICAS = 256
MIN_CONTEXT = 16


def add_simulate_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of the command."""
    parser.add_argument(
        "trace",
        metavar="TRACE",
        help="a file, or azure:FILE, mooncake:FILE, servegen:FILE; the format is told from the content",
    )
    what = parser.add_argument_group("what runs")
    what.add_argument(
        "--model",
        default="llama-3.1-8b",
        metavar="CONFIG",
        help=f"config.json or its folder, demo, or {', '.join(SHAPES)} (default: %(default)s)",
    )
    what.add_argument(
        "--gpu",
        default="h200",
        metavar="GPU",
        help=f"{', '.join(GPUS)}, or a cost_model.json that a server wrote (default: %(default)s)",
    )
    what.add_argument(
        "--quantization", default="nf4", choices=tuple(WEIGHT_BYTES), help="weights (default: %(default)s)"
    )
    what.add_argument(
        "--max-model-len", type=whole_from(MIN_CONTEXT), metavar="N", help="context (default: the model's)"
    )
    what.add_argument(
        "--jobs",
        default="1",
        metavar="SPEC",
        help="finetune jobs: N, or N:batch=8,tokens=512,max_tokens=2048,steps=100,rank=16,tenants=2; without "
        "steps they never end (default: %(default)s)",
    )
    what.add_argument("--policy", default="weft", choices=POLICY_NAMES, help="(default: %(default)s)")
    what.add_argument(
        "--slo",
        default="",
        metavar="SPEC",
        help="tpot=50,ttft=2000,percentile=95: milliseconds (default: that, or what FILE was run with)",
    )
    load = parser.add_argument_group("load")
    load.add_argument("--rate", type=positive, metavar="R", help="requests a second (default: the trace's)")
    load.add_argument("--rate-scale", type=positive, default=1.0, metavar="F", help="times as many a second")
    load.add_argument("--length-scale", type=positive, default=1.0, metavar="F", help="times as long")
    load.add_argument("--start", type=from_zero, default=0.0, metavar="S", help="begin at this second")
    load.add_argument("--duration", type=positive, metavar="S", help="only so many seconds of arrivals")
    load.add_argument("--tenants", type=whole_from(1), metavar="N", help="spread requests over N tenants")
    load.add_argument("--weights", default="", metavar="T=W,…", help="weights of tenants (default: 1)")
    load.add_argument("--adapters", type=count, default=0, metavar="N", help="adapters, by a power law")
    load.add_argument("--adapter-ranks", default="16", metavar="R,…", help="their ranks, in turn")
    load.add_argument("--seed", type=count, default=0, metavar="N", help="of all draws (default: 0)")
    load.add_argument("--noise", type=from_zero, metavar="X", help="spread of the device's times")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    output.add_argument("--png", type=Path, metavar="DIR", help="draw timeline and curves (needs matplotlib)")
    output.add_argument(
        "--window", default="0:3", metavar="S:E", help="seconds that the timeline shows (default: 0:3)"
    )
    output.add_argument(
        "--plan-gpus",
        nargs="?",
        const=16,
        type=whole_from(1),
        metavar="MAX",
        help="find how many such GPUs the trace needs, trying up to MAX (default: 16)",
    )


def read_jobs(text: str) -> tuple[JobSpec, ...]:
    """`N` or `N:key=value,…` as jobs; `tenants=K` gives them to K tenants in turn.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    count, _, rest = text.partition(":")
    num = _integer("--jobs", count, 0)
    values = {
        key: _integer(f"--jobs: {key}", value, 1) for key, value in _pairs("--jobs", rest, _JOB_KEYS).items()
    }
    num_tenants = values.pop("tenants", 1)
    names = {"batch": "batch_size", "tokens": "example_tokens", "max_tokens": "max_example_tokens"}
    names |= {"steps": "num_steps", "rank": "rank"}
    options = {names[key]: value for key, value in values.items()}
    options.setdefault("max_example_tokens", max(2048, 4 * options.get("example_tokens", 0)))
    tokens, most = options.get("example_tokens", 0), options["max_example_tokens"]
    if tokens > most:
        raise ConfigError(f"--jobs: tokens={tokens} is above max_tokens={most}: raise max_tokens.")
    return tuple(JobSpec(f"job-{idx}", f"trainer-{idx % num_tenants:02d}", **options) for idx in range(num))


def read_slo(text: str, default: Slo) -> Slo:
    """`tpot=50,ttft=2000,percentile=95`; what is left out is the default's.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    values = {key: _number(f"--slo: {key}", value) for key, value in _pairs("--slo", text, _SLO_KEYS).items()}
    percentile = values.get("percentile", default.percentile)
    if percentile > 100.0:
        raise ConfigError(f"--slo: percentile: {percentile:g} is not allowed. Allowed: above 0, at most 100.")
    return Slo(
        tpot_s=values["tpot"] / 1000 if "tpot" in values else default.tpot_s,
        ttft_s=values["ttft"] / 1000 if "ttft" in values else default.ttft_s,
        percentile=percentile,
    )


def read_weights(text: str, tenants: Sequence[str]) -> dict[str, float]:
    """`tenant=weight,…` of tenants that the trace has.

    Raises:
        ConfigError: an unknown tenant, or a weight that is not positive.
    """
    pairs = _pairs("--weights", text, None)
    unknown = sorted(set(pairs) - set(tenants))
    if unknown:
        raise ConfigError(
            f"--weights: there is no tenant {unknown[0]!r} in this simulation. Tenants: "
            f"{_first_few(tenants)}."
        )
    return {name: _number(f"--weights: {name}", value) for name, value in pairs.items()}


def read_ranks(text: str) -> tuple[int, ...]:
    """`8,16,32`.

    Raises:
        ConfigError: not numbers from 1.
    """
    return tuple(_integer("--adapter-ranks", part, 1) for part in text.split(","))


def read_window(text: str) -> tuple[float, float]:
    """`S:E` in seconds.

    Raises:
        ConfigError: not two numbers in order.
    """
    start, _, end = text.partition(":")
    try:
        window = (float(start), float(end))
    except ValueError:
        window = (0.0, 0.0)
    if not 0.0 <= window[0] < window[1]:
        raise ConfigError(f"--window: {text!r} is not allowed. Allowed: START:END in seconds, as 10:13.")
    return window


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _pairs(flag: str, text: str, allowed: Sequence[str] | None) -> Mapping[str, str]:
    pairs: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or (allowed is not None and key not in allowed):
            keys = "" if allowed is None else f" with {', '.join(allowed)}"
            raise ConfigError(f"{flag}: {part!r} is not allowed. Allowed: KEY=VALUE{keys}.")
        pairs[key] = value
    return pairs


def _integer(source: str, text: str, lowest: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = lowest - 1
    if value < lowest:
        raise ConfigError(f"{source}: {text!r} is not allowed. Allowed: a whole number from {lowest}.")
    return value


def _number(source: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise ConfigError(f"{source}: {text!r} is not allowed. Allowed: a number above 0.")
    return value
