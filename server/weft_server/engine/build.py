"""Wires an engine together from a configuration: the one place where its collaborators meet.

Needs torch, triton, safetensors and tokenizers alone; stores and sockets are injected by `process.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from weft_scheduler.budget import LatencyTargets
from weft_scheduler.cost import CostModel
from weft_scheduler.policies import Policy
from weft_scheduler.scheduler import Scheduler
from weft_scheduler.simulator.fitted import describe
from weft_server.adapters.arena import AdapterArena
from weft_server.adapters.fetch import AdapterFetcher
from weft_server.adapters.host_cache import HostCache
from weft_server.cache.kv import KvCache
from weft_server.engine.calibration import calibrate
from weft_server.engine.config import EngineConfig
from weft_server.engine.engine import Engine
from weft_server.engine.graph_buffers import BatchLimits
from weft_server.engine.graph_capture import CudaCapture, capture_graphs
from weft_server.engine.jobs import BaseFacts, BlobIO, JobManager
from weft_server.engine.layer_graphs import LayerGraphs, supports_graphs
from weft_server.engine.paging import AdapterPager
from weft_server.engine.runner import Runner
from weft_server.engine.sizing import (
    Sizes,
    choose_device,
    choose_dtype,
    choose_sizes,
    free_memory_bytes,
    use_device,
)
from weft_server.engine.warmup import warm_up
from weft_server.errors import ConfigError
from weft_server.model.config import ModelConfig
from weft_server.model.decoder import Decoder
from weft_server.model.fingerprint import base_fingerprint
from weft_server.model.loading import Quantization, load_weights
from weft_server.model.weights import DecoderWeights
from weft_server.protocol import EngineReady

log = logging.getLogger(__name__)

PLAN_FILE = "kernel_plans.json"
"""In the data folder: which way of computing each product was measured to be the fastest on this device."""

_HOST_CACHE_BYTES = 2 << 30
_PINNED_FILL = 15 / 16
"""Part of the pinned adapters' region that is offered: the rest is for the alignment of their tensors."""
_GRAD_LAYOUT_SHARE = 0.25
"""Part of the free memory that finetuning's own layout of the weights may take."""
_BLOCK_TABLE_SHARE = 2
"""Block tables of graphs have room for every block so many times: sequences may share a prefix."""
_DEFAULT_TTFT_S = {"cuda": 2.0, "cpu": 5.0}
_DEFAULT_CUDA_TPOT_S = 0.050
_CPU_TPOT_FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine ready to step, what it announces, and its scheduler, for whoever changes targets."""

    engine: Engine
    ready: EngineReady
    scheduler: Scheduler
    describe_device: Callable[[], dict[str, Any]]
    """What the scheduler has learnt of the device, for simulations."""


def build_engine(
    config: EngineConfig,
    blobs: BlobIO,
    *,
    record_plan: Callable[[list[str]], None] | None = None,
    policy: Policy | None = None,
) -> BuiltEngine:
    """Load the base, size everything, calibrate, and wire; the calling thread must be the one that steps.

    `record_plan` and `policy` are those of `assemble_engine`.

    Raises:
        WeftError: a bad model directory, or sizes that cannot be honoured.
    """
    device = choose_device(config.device)
    use_device(device)
    dtype = choose_dtype(config.dtype, device)
    path = Path(config.model_dir)
    model = ModelConfig.from_directory(path)
    started = time.perf_counter()
    weights = load_weights(
        path,
        model,
        device=device,
        dtype=dtype,
        quantization=cast(Quantization, config.quantization),
        low_memory=config.low_memory,
    )
    log.info("loaded %s in %.1f s", path, time.perf_counter() - started)
    if weights.deferred_bytes > _GRAD_LAYOUT_SHARE * free_memory_bytes(device):
        weights.forgo_grad_layouts()
    fingerprint = base_fingerprint(path)
    return assemble_engine(
        config, weights, blobs, base_fingerprint=fingerprint, record_plan=record_plan, policy=policy
    )


def assemble_engine(
    config: EngineConfig,
    weights: DecoderWeights,
    blobs: BlobIO,
    *,
    base_fingerprint: str,
    record_plan: Callable[[list[str]], None] | None = None,
    sizes: Sizes | None = None,
    clock: Callable[[], float] = time.monotonic,
    policy: Policy | None = None,
) -> BuiltEngine:
    """An engine over loaded weights.

    Args:
        config, weights: the settings, and the frozen base that they are about.
        blobs: where adapters, datasets and checkpoints are read from and written to.
        base_fingerprint: announced with the engine.
        record_plan: told the requests and jobs of every iteration before it runs.
        sizes: replaces what would be chosen from the configuration and the device.
        clock: the time that scheduling and retries go by, in seconds.
        policy: for benchmarks: how iterations are shared; a server's is Weft's.

    Raises:
        ConfigError: sizes that cannot be honoured.
    """
    sizes = sizes or choose_sizes(config, weights)
    limits, model, device = sizes.limits, weights.config, weights.device
    decoder = Decoder(weights, max_positions=limits.max_model_len)
    with _allocating("--kv-cache-tokens", limits.capacity_tokens):
        cache = KvCache(
            num_layers=model.num_layers,
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=weights.dtype,
            device=device,
        )
    with _allocating("--adapter-arena-mb", limits.arena_elements * weights.dtype.itemsize >> 20):
        arena = AdapterArena(
            limits.arena_elements,
            limits.num_adapter_slots,
            model.num_layers,
            dtype=weights.dtype,
            device=device,
        )
    warm_up(decoder, cache, arena, Path(config.data_dir) / PLAN_FILE if config.data_dir else None)
    runner = Runner(
        decoder,
        cache,
        arena.table,
        max_num_seqs=limits.max_num_seqs,
        window_tokens=limits.window_tokens,
        graphs=None if config.enforce_eager else _layer_graphs(decoder, cache, arena, sizes),
    )
    calibration = calibrate(runner, limits, arena, model.module_shapes)
    targets = _targets(config, device, calibration.unloaded_decode_s)
    cost = CostModel()
    cost.calibrate(calibration.samples)
    scheduler = Scheduler(limits, cost, targets, policy=policy, flex_targets=_flex_targets(config, targets))
    for tenant, weight in (config.tenant_weights or {}).items():
        scheduler.set_weight(tenant, weight)
    scheduler.set_max_concurrency(config.tenant_max_concurrency or {})
    shapes = model.module_shapes
    fetcher = AdapterFetcher(
        blobs.read,
        HostCache(_HOST_CACHE_BYTES),
        num_layers=model.num_layers,
        shapes=shapes,
        dtype=weights.dtype,
        pin_memory=device.type == "cuda",
    )
    pager = AdapterPager(arena, fetcher, scheduler)
    facts = BaseFacts(
        num_layers=model.num_layers,
        shapes=shapes,
        vocab_size=model.vocab_size,
        max_model_len=limits.max_model_len,
        device=device,
        dtype=weights.dtype,
        name=config.model_name,
    )
    jobs = JobManager(facts, blobs, scheduler, runner, pager, max_pack_tokens=sizes.max_pack_tokens)
    engine = Engine(
        scheduler=scheduler,
        runner=runner,
        pager=pager,
        fetcher=fetcher,
        jobs=jobs,
        pipeline_depth=sizes.pipeline_depth,
        prefix_cache=config.prefix_cache,
        record_plan=record_plan,
        clock=clock,
    )
    describe_device = partial(
        describe,
        scheduler,
        model=config.model_name,
        device=str(device),
        max_pack_tokens=sizes.max_pack_tokens,
    )
    announcement = _announcement(weights, sizes, targets, scheduler, base_fingerprint)
    return BuiltEngine(engine, announcement, scheduler, describe_device)


@contextmanager
def _allocating(flag: str, size: int) -> Iterator[None]:
    """Free memory is no promise (fragments, limits of the process): say which size asked for too much."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"{flag} is {size}, and that much memory cannot be allocated; give a smaller {flag}. ({error})"
        ) from error


def _layer_graphs(decoder: Decoder, cache: KvCache, arena: AdapterArena, sizes: Sizes) -> LayerGraphs | None:
    """Captured graphs of all layers, where there can be any.

    Raises:
        ConfigError: the device or its driver refuses to capture.
    """
    if not supports_graphs(decoder, cache):
        return None
    limits = BatchLimits(
        max_rows=sizes.limits.max_batch_tokens,
        max_num_seqs=sizes.limits.max_num_seqs,
        max_blocks=_BLOCK_TABLE_SHARE * cache.num_blocks,
    )
    graphs = LayerGraphs(decoder, cache, arena.table, limits, CudaCapture(decoder.device))
    try:
        capture_graphs(graphs, decoder.device, max_bytes=sizes.max_graph_bytes)
    except RuntimeError as error:
        raise ConfigError(f"CUDA graphs cannot be captured; start with --enforce-eager. ({error})") from error
    return graphs


def _targets(config: EngineConfig, device: torch.device, unloaded_decode_s: float) -> LatencyTargets:
    factor: float | None = None
    if config.tpot_slo_ms is not None:
        tpot_s = config.tpot_slo_ms / 1000
    elif device.type == "cuda":
        tpot_s = _DEFAULT_CUDA_TPOT_S
    else:
        # The API process shares the CPU: only iterations that serve somebody show what decoding takes.
        factor = _CPU_TPOT_FACTOR
        tpot_s = factor * unloaded_decode_s
    ttft_s = _DEFAULT_TTFT_S[device.type] if config.ttft_slo_ms is None else config.ttft_slo_ms / 1000
    return LatencyTargets(
        tpot_s=tpot_s, ttft_s=ttft_s, percentile=config.slo_percentile, unloaded_factor=factor
    )


def _flex_targets(config: EngineConfig, targets: LatencyTargets) -> LatencyTargets:
    """Those of the default class, relaxed, where the flex class has none of its own."""
    relaxed = targets.relaxed()
    if config.flex_tpot_slo_ms is not None:
        relaxed = replace(relaxed, tpot_s=config.flex_tpot_slo_ms / 1000, unloaded_factor=None)
    if config.flex_ttft_slo_ms is not None:
        relaxed = replace(relaxed, ttft_s=config.flex_ttft_slo_ms / 1000)
    return relaxed


def _announcement(
    weights: DecoderWeights,
    sizes: Sizes,
    targets: LatencyTargets,
    scheduler: Scheduler,
    fingerprint: str,
) -> EngineReady:
    limits = sizes.limits
    return EngineReady(
        max_model_len=limits.max_model_len,
        vocab_size=weights.config.vocab_size,
        max_num_seqs=limits.max_num_seqs,
        max_batch_tokens=limits.max_batch_tokens,
        kv_cache_tokens=limits.capacity_tokens,
        adapter_arena_bytes=limits.arena_elements * weights.dtype.itemsize,
        device=str(weights.device),
        dtype=str(weights.dtype).removeprefix("torch."),
        quantization=weights.layers[0].qkv.format,
        base_fingerprint=fingerprint,
        tpot_slo_ms=targets.tpot_s * 1000,
        ttft_slo_ms=targets.ttft_s * 1000,
        pinned_arena_bytes=int(scheduler.max_pinned_elements * _PINNED_FILL) * weights.dtype.itemsize,
        max_pinned_adapters=scheduler.max_pinned_adapters,
    )
