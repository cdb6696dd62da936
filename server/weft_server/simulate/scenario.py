"""From options to a trace and a setup: which model, device, tenants, adapters and jobs are simulated."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from weft_scheduler.limits import Limits
from weft_scheduler.policies import StaticCapPolicy
from weft_scheduler.simulator.device_model import DeviceModel, FittedDevice, Roofline
from weft_scheduler.simulator.fitted import Fitted, read_fitted
from weft_scheduler.simulator.gpus import GPUS, DoesNotFit, Gpu, choose_limits
from weft_scheduler.simulator.readers import TraceError, read_trace
from weft_scheduler.simulator.report import Slo
from weft_scheduler.simulator.shapes import SHAPES, ModelShape
from weft_scheduler.simulator.simulation import Setup
from weft_scheduler.simulator.trace import (
    Trace,
    fit_context,
    scale_lengths,
    scale_rate,
    spread_over_adapters,
    spread_over_tenants,
)
from weft_server import demo
from weft_server.errors import ConfigError
from weft_server.model.config import ModelConfig, ModelError
from weft_server.simulate.arguments import read_jobs, read_ranks, read_slo, read_weights, read_window

DEFAULT_NOISE = 0.05


@dataclass(frozen=True, slots=True)
class Scenario:
    """A simulation to be run, and what it is of."""

    trace: Trace
    setup: Setup
    model: str
    device: str
    quantization: str


def read_scenario(options: argparse.Namespace) -> Scenario:
    """Everything that the options name, read and checked.

    Raises:
        ConfigError: a value, file, model or device that cannot be; it names the flag and what is allowed.
    """
    shape = read_shape(options.model)
    gpu, limits, device, fitted = _read_device(options, shape)
    trace = _read_trace(options, limits)
    jobs = read_jobs(options.jobs)
    ranks = read_ranks(options.adapter_ranks)
    adapters = sorted({request.adapter for request in trace if request.adapter is not None})
    noise = options.noise if options.noise is not None else fitted.noise if fitted else DEFAULT_NOISE
    tenants = sorted({request.tenant for request in trace} | {job.tenant for job in jobs})
    setup = Setup(
        limits=limits,
        device=device,
        gpu=gpu,
        slo=read_slo(options.slo, fitted.slo if fitted else Slo()),
        jobs=jobs,
        policy=options.policy,
        weights=read_weights(options.weights, tenants),
        adapter_elements={
            name: shape.adapter_elements(ranks[idx % len(ranks)]) for idx, name in enumerate(adapters)
        },
        job_elements={job.job_id: shape.adapter_elements(job.rank) for job in jobs},
        noise=noise,
        seed=options.seed,
        timeline_s=read_window(options.window),
        max_pack_tokens=fitted.max_pack_tokens if fitted else None,
    )
    _check_adapters(setup)
    _check_examples(setup)
    return Scenario(trace, setup, shape.name, options.gpu, "as served" if fitted else options.quantization)


def read_shape(model: str) -> ModelShape:
    """The shape of a known model, of `demo`, or of a config.json or its folder.

    Raises:
        ConfigError: no such file or name, or a model that Weft does not serve.
    """
    if model in SHAPES:
        return SHAPES[model]
    path = Path(demo.__file__).parent / "base_model" if model == "demo" else Path(model).expanduser()
    folder = path.parent if path.is_file() else path
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"--model: {model!r} is not allowed. Allowed: a config.json, its folder, demo, "
            f"{', '.join(SHAPES)}."
        )
    try:
        if path.is_file():
            config = ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
        else:
            config = ModelConfig.from_directory(path)
    except (ModelError, ValueError, OSError) as error:
        raise ConfigError(f"--model {model}: {error}") from error
    return ModelShape(
        name=model if model == "demo" else folder.name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_model_len=config.max_position_embeddings,
    )


def _read_device(
    options: argparse.Namespace, shape: ModelShape
) -> tuple[Gpu, Limits, DeviceModel, Fitted | None]:
    name = options.gpu
    if name not in GPUS:
        fitted = _read_fitted(name)
        gpu = GPUS["cpu" if fitted.device == "cpu" else "h200"]
        if fitted.limits.num_layers != shape.num_layers:
            raise ConfigError(
                f"--gpu {name} was fitted on {fitted.model} with {fitted.limits.num_layers} layers; --model "
                f"{options.model} has {shape.num_layers}: give the model that was served"
            )
        return gpu, fitted.limits, FittedDevice(fitted.cost), fitted
    gpu = GPUS[name]
    if options.max_model_len is not None and options.max_model_len > shape.max_model_len:
        raise ConfigError(
            f"--max-model-len: {options.max_model_len} is not allowed. Allowed: at most "
            f"{shape.max_model_len}, the positions of {shape.name}."
        )
    try:
        # A static cap is kept by windows of its size.
        window = StaticCapPolicy().max_train_tokens if options.policy == "static-cap" else gpu.window_tokens
        limits = choose_limits(
            shape,
            gpu,
            options.quantization,
            max_model_len=options.max_model_len,
            window_tokens=min(window, gpu.window_tokens),
        )
    except DoesNotFit as error:
        raise ConfigError(f"--gpu {name}: {error}") from error
    return gpu, limits, Roofline(shape, gpu, options.quantization), None


def _read_fitted(name: str) -> Fitted:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"--gpu: {name!r} is not allowed. Allowed: {', '.join(GPUS)}, or a cost_model.json file."
        )
    try:
        return read_fitted(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"--gpu {name}: not a fitted cost model: {error}") from error


def _read_trace(options: argparse.Namespace, limits: Limits) -> Trace:
    try:
        trace = read_trace(
            options.trace,
            seed=options.seed,
            start_s=options.start,
            duration_s=options.duration,
            requests_per_s=options.rate,
        )
    except TraceError as error:
        raise ConfigError(f"TRACE: {error}") from error
    if options.rate_scale != 1.0:
        trace = scale_rate(trace, options.rate_scale)
    if options.length_scale != 1.0:
        trace = scale_lengths(trace, options.length_scale)
    trace = fit_context(trace, min(limits.max_model_len, limits.capacity_tokens // 2))
    if options.tenants is not None:
        trace = spread_over_tenants(trace, options.tenants, options.seed)
    return spread_over_adapters(trace, options.adapters, options.seed)


def _check_examples(setup: Setup) -> None:
    """Refuse examples that no pack can hold.

    Raises:
        ConfigError: naming their length and the longest allowed.
    """
    longest = max((job.example_tokens for job in setup.jobs), default=0)
    if longest > setup.limits.max_pack_tokens:
        raise ConfigError(
            f"--jobs: examples of {longest} tokens do not fit the memory for finetuning: give at most "
            f"tokens={setup.limits.max_pack_tokens}"
        )


def _check_adapters(setup: Setup) -> None:
    """Refuse what the arena can never hold, before anything runs."""
    limits = setup.limits
    largest = max(setup.adapter_elements.values(), default=0)
    if largest > limits.arena_elements // 2:
        raise ConfigError(
            f"--adapter-ranks: an adapter of {largest} elements does not fit half of the arena of "
            f"{limits.arena_elements}: lower the ranks"
        )
    largest = max(setup.job_elements.values(), default=0)
    pinned = int(limits.arena_elements * limits.training_adapter_share)
    if largest > pinned:
        raise ConfigError(
            f"--jobs: an adapter of {largest} elements does not fit what jobs may pin ({pinned}): lower rank"
        )
