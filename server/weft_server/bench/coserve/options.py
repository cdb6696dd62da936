"""What a run measures: sizes, loads, objectives and how long each window takes.

Defaults depend on the device and on `--quick`; they are all here.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from weft_server.bench.coserve.measures import Slo
from weft_server.bench.coserve.setup import Setup
from weft_server.bench.shapes import read_shape
from weft_server.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SloSpec:
    """An objective before the machine is known: milliseconds per token, or times what it takes unloaded."""

    text: str
    factor: float | None
    tpot_ms: float | None

    @staticmethod
    def parse(text: str) -> SloSpec:
        """`1.5x` or `50` (milliseconds).

        Raises:
            ConfigError: neither.
        """
        try:
            value = float(text.removesuffix("x"))
        except ValueError:
            value = 0.0
        if not 0.0 < value < float("inf"):
            raise ConfigError(f"--slo: {text!r} is not allowed. Allowed: as 1.5x, or milliseconds as 50.")
        return SloSpec(text, value, None) if text.endswith("x") else SloSpec(text, None, value)

    def resolve(self, unloaded_s: float, ttft_s: float) -> Slo:
        """The objective on this machine."""
        if self.factor is not None:
            return Slo(f"{self.factor:g}x unloaded", self.factor * unloaded_s, ttft_s)
        return Slo(f"{self.tpot_ms:g} ms", (self.tpot_ms or 0.0) / 1000, ttft_s)


@dataclass(frozen=True, slots=True)
class Options:
    """Everything that a run is told. `loads` are requests a second; None: found from the machine."""

    setup: Setup
    trace: str | None
    length_scale: float
    loads: tuple[float, ...] | None
    load_shares: tuple[float, ...]
    slos: tuple[SloSpec, ...]
    ttft_s: float
    seconds: float
    settle_s: float
    drain_s: float
    is_quick: bool
    with_peers: bool
    out: Path | None

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.setup.device != "cpu"


def read_options(arguments: argparse.Namespace) -> Options:
    """Fill in what the command line leaves open.

    Raises:
        ConfigError: a value that is not allowed, with those that are.
    """
    from weft_server.engine.sizing import choose_device

    device = choose_device(arguments.device)
    is_gpu, is_quick = device.type == "cuda", arguments.quick
    shape = read_shape(arguments.model or ("llama-3.1-8b" if is_gpu else "bench-200m"))
    example_tokens = min(2048 if is_gpu else 512, shape.config.max_position_embeddings)
    setup = Setup(
        shape_name=shape.name,
        hf_config=dict(shape.hf_config),
        device=str(device) if device.index is None else f"cuda:{device.index}",
        dtype=arguments.dtype,
        quantization=arguments.quantization or ("nf4" if is_gpu else "none"),
        max_model_len=min(8192 if is_gpu else 2048, shape.config.max_position_embeddings),
        num_adapters=arguments.adapters,
        example_tokens=example_tokens,
        max_batch=256 if is_gpu else 32,
        seed=arguments.seed,
    )
    seconds = arguments.seconds or (8.0 if is_gpu else 6.0 if is_quick else 18.0)
    slos = arguments.slo or ("15,50" if is_gpu else "1.5x,4x")
    return Options(
        setup=setup,
        trace=arguments.trace,
        length_scale=arguments.length_scale or (1.0 if is_gpu else 0.125),
        loads=_loads(arguments.loads) or ((1.0, 5.0, 15.0) if is_gpu else None),
        load_shares=(0.5,) if is_quick else (0.1, 0.3, 0.45, 0.75),
        slos=tuple(SloSpec.parse(part) for part in slos.split(",")),
        ttft_s=arguments.ttft_slo_ms / 1000,
        seconds=seconds,
        settle_s=2.0,
        drain_s=min(seconds, 4.0 if is_quick or is_gpu else 8.0),
        is_quick=is_quick,
        with_peers=not arguments.no_peers,
        out=arguments.out,
    )


def _loads(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        loads = tuple(float(part) for part in text.split(","))
    except ValueError:
        loads = ()
    if not loads or min(loads) <= 0.0:
        raise ConfigError(f"--loads: {text!r} is not allowed. Allowed: requests a second, as 0.5,1,2.")
    return tuple(sorted(loads))
