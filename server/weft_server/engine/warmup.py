"""First launches, before there is anybody who waits for them.

Triton compiles a kernel when it is first launched with a new combination of tile sizes: seconds, in which a
serving engine would stand still. So at start every combination that can occur is launched once, on zeros and
on a dummy adapter that is gone afterwards. Where there are several ways to compute a product, they are
measured then, too, and the fastest is used from there on.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from weft_kernels.attention import (
    LARGE_TILE,
    AttentionBatch,
    DecodeRow,
    KeyTarget,
    SavedAttention,
    attention_backward,
    make_chunk,
    paged_attention,
)
from weft_kernels.lora import LoraBatch, LoraDropout, LoraEntry, lora_backward, lora_forward
from weft_kernels.nf4 import Nf4Weight
from weft_kernels.norm import add_rms_norm, rms_norm_backward
from weft_kernels.product import MAX_PLANNED_ROWS, ROW_BUCKETS, Direction, Plan, PlanTable, candidates
from weft_kernels.product.tuning import DeviceTimer, PlanFile, Tuner, device_owner
from weft_kernels.rope import KvSlots, rotate_backward, rotate_queries, write_rotated
from weft_kernels.sampling import draw
from weft_kernels.swiglu import swiglu, swiglu_backward
from weft_server.adapters.arena import AdapterArena
from weft_server.adapters.image import HostImage
from weft_server.adapters.layout import AdapterLayout, ModuleShapes
from weft_server.adapters.paths import MODULE_GROUPS, MODULES
from weft_server.cache.kv import KvCache
from weft_server.model.decoder import Decoder
from weft_server.model.weights import DecoderWeights
from weft_server.quant.linear import QuantizedLinear
from weft_server.training.loss import loss_head

log = logging.getLogger(__name__)

TILES = (16, 32, 64)
"""Rows, and ranks, of the tiles that the kernels are compiled for: sizes that fill one of each."""

_MANY_KEYS = 4096
"""Keys of a decode row that are split over programs."""

MAX_MEASURING_S = 120.0
"""Most of it goes into compiling, once per machine: Triton keeps what it compiled. What is left to measure
when it is over runs as the defaults say, and is measured at the next start."""


def warm_up(decoder: Decoder, cache: KvCache, arena: AdapterArena, plan_file: Path | None = None) -> None:
    """Launch what the engine will launch; nothing to do where the reference runs (CPU, or float64).

    Args:
        plan_file: where the measured plans of products are kept from one start to the next.
    """
    if decoder.device.type != "cuda" or decoder.dtype == torch.float64:
        return
    started = time.perf_counter()
    plans = PlanFile(plan_file, device_owner(decoder.device))
    warm_linears(decoder.weights, Tuner(plans, DeviceTimer(decoder.device), max_seconds=MAX_MEASURING_S))
    plans.save()
    warm_rows(decoder)
    warm_attention(decoder, cache)
    warm_lora(arena, decoder.config.num_layers, decoder.config.module_shapes)
    torch.cuda.synchronize(decoder.device)
    log.info("compiled and loaded the kernels in %.1f s", time.perf_counter() - started)


@torch.no_grad()
def warm_linears(weights: DecoderWeights, tuner: Tuner) -> None:
    """Choose the plans of every linear, and run each once; those of equal shape and format share them."""
    tables: dict[str, PlanTable] = {}
    for layer in weights.layers:
        for linear in layer.linears:
            if linear.is_expanded:
                continue
            key = _kind(linear)
            if key not in tables:
                tables[key] = _choose_plans(linear, key, tuner, weights.device)
            linear.plans = tables[key]


def _kind(linear: QuantizedLinear) -> str:
    """Equal for linears whose products launch the same code."""
    parts: list[object] = [linear.format, linear.dtype, f"{linear.out_features}x{linear.in_features}"]
    packed = linear.packed
    if isinstance(packed, Nf4Weight):
        parts += [packed.dtype, packed.block_size, "nested" if packed.nested else "plain"]
        parts += [] if packed.has_nf4_values else ["other values"]
    parts += [] if linear.bias is None else ["bias"]
    return " ".join(str(part).removeprefix("torch.") for part in parts)


def _choose_plans(linear: QuantizedLinear, key: str, tuner: Tuner, device: torch.device) -> PlanTable:
    shape = (linear.out_features, linear.in_features)

    def choose(direction: Direction) -> tuple[Plan, ...]:
        width = shape[1] if direction == "forward" else shape[0]
        plans = []
        for bucket in ROW_BUCKETS:
            rows = torch.zeros(bucket, width, dtype=linear.dtype, device=device)
            run = partial(_run_linear, linear, direction, rows)
            plans.append(
                tuner.choose(f"{key} {direction} {bucket}", candidates(direction, bucket, shape), run)
            )
        return tuple(plans)

    table = PlanTable(forward=choose("forward"), input_grad=choose("input_grad"))
    beyond = torch.zeros(MAX_PLANNED_ROWS + 1, shape[1], dtype=linear.dtype, device=device)
    linear.input_grad(linear.forward(beyond))
    return table


def _run_linear(linear: QuantizedLinear, direction: Direction, rows: torch.Tensor, plan: Plan) -> None:
    every = (plan,) * len(ROW_BUCKETS)
    linear.plans = PlanTable(forward=every, input_grad=every)
    linear.forward(rows) if direction == "forward" else linear.input_grad(rows)


@torch.no_grad()
def warm_rows(decoder: Decoder) -> None:
    """What works row by row: norms, rotation, activation, loss head and drawing, forward and backward."""
    config, weights, device = decoder.config, decoder.weights, decoder.device
    layer = weights.layers[0]

    def zeros(*shape: int, dtype: torch.dtype = decoder.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    rows, indices = zeros(1, config.hidden_size), zeros(1, dtype=torch.int64)
    add_rms_norm(rows, rows.clone(), layer.post_attention_norm, config.rms_norm_eps)
    rms_norm_backward(rows, layer.input_norm, rows, config.rms_norm_eps, rows)
    loss_head(rows, indices, indices, weights.norm, weights.lm_head, eps=config.rms_norm_eps)
    gate_up = zeros(1, 2 * config.intermediate_size)
    swiglu_backward(gate_up, swiglu(gate_up))
    draw(zeros(1, config.vocab_size, dtype=torch.float32), zeros(1, dtype=torch.float64))
    kv_shape = (1, config.num_kv_heads, config.head_dim)
    qkv = zeros(1, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
    rotation, norms = decoder.rotary.at(indices), decoder.head_norms(layer)
    q = write_rotated(qkv, rotation, norms, KvSlots(zeros(1, *kv_shape), zeros(1, *kv_shape), indices))
    rotate_queries(qkv, rotation, norms, config.num_kv_heads)
    d_kv = zeros(*kv_shape, dtype=torch.float32)
    rotate_backward(qkv, rotation, norms, q, d_kv, d_kv)


@torch.no_grad()
def warm_attention(decoder: Decoder, cache: KvCache) -> None:
    """Decode rows of few and of many keys, short and long chunks, with and without a backward. Reads what is
    in the cache's first block."""
    config, device = decoder.config, decoder.device
    keys, values, block_size = cache.keys[0], cache.values[0], cache.block_size
    for num_tokens, num_blocks in ((1, 1), (LARGE_TILE, -(-_MANY_KEYS // block_size))):
        table = torch.zeros(num_blocks, dtype=torch.int64, device=device)
        row = DecodeRow([0] * num_blocks, num_blocks * block_size)
        chunk = make_chunk(0, num_tokens, 0, num_tokens, table, block_size)
        q = torch.zeros(num_tokens + 1, config.num_heads, config.head_dim, dtype=decoder.dtype, device=device)
        batch = AttentionBatch([row], [chunk._replace(row_start=1)])
        paged_attention(q, keys, values, batch, scale=decoder.scale)
        trained, stats = AttentionBatch((), [chunk]), q.new_empty(q[1:].shape[:2], dtype=torch.float32)
        out = paged_attention(q[1:], keys, values, trained, scale=decoder.scale, stats=stats)
        saved = SavedAttention(q[1:], keys, values, trained, decoder.scale, None, out, stats)
        accumulators = torch.zeros(
            2, num_tokens, config.num_kv_heads, config.head_dim, dtype=torch.float32, device=device
        )
        attention_backward(out, saved, [KeyTarget(accumulators[0], accumulators[1], 0)])


def warm_lora(arena: AdapterArena, num_layers: int, shapes: ModuleShapes) -> None:
    """Every tile of rows and of ranks, forward and backward, with and without dropout, in every group of
    modules. The arena must be empty, and is so afterwards."""
    for rank in TILES:
        image = dummy_image(num_layers, shapes, rank, layers=range(1), dtype=arena.weights.dtype)
        if image.num_elements > arena.num_elements:
            log.warning("the kernels for rank %d are compiled when used: the arena is too small", rank)
            continue
        with resident(arena, [image]):
            for num_rows in TILES:
                for has_dropout in (False, True):
                    _run_groups(arena, shapes, num_rows, image.num_elements, has_dropout=has_dropout)


@contextlib.contextmanager
def resident(arena: AdapterArena, images: list[HostImage]) -> Iterator[None]:
    """Adapters in slots 0, 1, … of an empty arena, one behind the other; gone on leaving."""
    offset = 0
    for slot, image in enumerate(images):
        arena.load(slot, offset, image)
        offset += image.num_elements
    try:
        yield
    finally:
        for slot in range(len(images)):
            arena.clear(slot)


def dummy_image(
    num_layers: int, shapes: ModuleShapes, rank: int, *, layers: range, dtype: torch.dtype
) -> HostImage:
    """An adapter of zeros on every module of these layers."""
    ranks = {(layer, module): rank for layer in layers for module in shapes}
    layout = AdapterLayout.build(num_layers, shapes, ranks)
    entries = tuple(
        LoraEntry(
            layer=entry.layer,
            module=entry.module,
            rank=entry.rank,
            in_features=entry.in_features,
            out_features=entry.out_features,
            a_offset=entry.a_offset,
            b_offset=entry.b_offset,
            scale=1.0,
        )
        for entry in layout
    )
    return HostImage("dummy", torch.zeros(layout.num_elements, dtype=dtype), entries)


@torch.no_grad()
def _run_groups(
    arena: AdapterArena, shapes: ModuleShapes, num_rows: int, num_elements: int, *, has_dropout: bool
) -> None:
    device, dtype = arena.weights.device, arena.weights.dtype
    batch = LoraBatch.build([(0, 0, num_rows)], device)
    assert batch is not None  # it has rows
    dropout = None
    if has_dropout:
        keys = torch.zeros(num_rows, dtype=torch.int64, device=device)
        dropout = LoraDropout(torch.full((num_rows,), 0.5, device=device), keys)
    grads = {0: torch.zeros(num_elements, dtype=torch.float32, device=device)}
    for group in MODULE_GROUPS:
        modules = tuple(MODULES.index(module) for module in group)
        widths = tuple(shapes[module][1] for module in group)
        x = torch.zeros(num_rows, shapes[group[0]][0], dtype=dtype, device=device)
        y = torch.zeros(num_rows, sum(widths), dtype=dtype, device=device)
        lora_forward(x, y, arena.table, 0, modules, widths, batch, dropout)
        lora_backward(x, y, torch.zeros_like(x), grads, arena.table, 0, modules, widths, batch, dropout)
