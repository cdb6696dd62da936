"""What an engine-level part runs on: model, device, dtype, format and time, from the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import cast

import torch

from weft_server.adapters.layout import MAX_RANK
from weft_server.bench import ceilings
from weft_server.bench.ceilings import Ceilings
from weft_server.bench.models import RandomModel
from weft_server.bench.report import Report
from weft_server.bench.shapes import read_shape
from weft_server.engine.sizing import choose_device, use_device
from weft_server.errors import ConfigError
from weft_server.model.loading import Quantization

_CEILINGS_S = 2.0
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Setting:
    """One run's subject: random weights of a shape, in a format, on a device; `budget_s` of measuring a
    comparison."""

    model: RandomModel
    quantization: Quantization
    budget_s: float
    seed: int

    @property
    def device(self) -> torch.device:
        """Where everything computes."""
        return self.model.device

    @property
    def on_gpu(self) -> bool:
        """Whether that is a GPU."""
        return self.device.type == "cuda"

    @property
    def vocab_size(self) -> int:
        """Token ids lie below it."""
        return self.model.config.vocab_size

    def report(self, part: str, title: str) -> Report:
        """An empty report named after part, shape and kind of device."""
        name = f"{part}-{self.model.shape.name}-{'gpu' if self.on_gpu else 'cpu'}"
        report = Report(name, f"{title}: {self.model.shape.name}, {self.describe()}")
        report.data["setting"] = {
            "model": self.model.shape.name,
            "device": str(self.device),
            "dtype": str(self.model.dtype),
            "quantization": self.quantization,
            "seed": self.seed,
        }
        return report

    def describe(self) -> str:
        """Format, dtype and device in words."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        weights = dtype if self.quantization == "none" else f"{self.quantization}, {dtype}"
        return f"{weights}, {self.device.type}"


def read_setting(arguments: argparse.Namespace) -> Setting:
    """From the flags of `arguments.add_model_arguments`.

    Raises:
        ConfigError: a device that is not there, or an unknown model.
    """
    device = choose_device(arguments.device)
    use_device(device)
    on_gpu = device.type == "cuda"
    shape = read_shape(arguments.model or ("llama-3.1-8b" if on_gpu else "bench-200m"))
    model = RandomModel(shape, dtype=_DTYPES[arguments.dtype], device=device, seed=arguments.seed)
    quantization = cast(Quantization, arguments.quantization or ("nf4" if on_gpu else "none"))
    return Setting(model, quantization, arguments.budget_s, arguments.seed)


def check_rank(rank: int) -> None:
    """Raises ConfigError for an `--adapter-rank` that no adapter has."""
    if rank > MAX_RANK:
        raise ConfigError(f"--adapter-rank {rank} is beyond the largest rank, {MAX_RANK}")


def measure_ceilings(setting: Setting) -> Ceilings:
    """The hardware's ceilings now."""
    budget_s = min(_CEILINGS_S, setting.budget_s)
    return ceilings.measure_ceilings(setting.device, setting.model.dtype, budget_s=budget_s)


def add_ceilings(report: Report, measured: Ceilings) -> None:
    """Put ceilings into the report."""
    table = report.table("Ceilings measured in this run", ("ceiling", "value", "unit"))
    for row in measured.rows():
        table.add(*row)
