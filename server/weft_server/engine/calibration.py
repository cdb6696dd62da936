"""Measures the engine on this machine at start: a few seconds of synthetic iterations through the real
runner.

The samples seed the cost model; the unloaded decode time is the CPU's default latency target.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median

import torch

from weft_scheduler.features import PlanFeatures
from weft_scheduler.limits import Limits
from weft_scheduler.plan import BackwardSlice, Segment, SegmentKind, StepPlan
from weft_server.adapters.arena import AdapterArena
from weft_server.adapters.paths import ModuleShapes
from weft_server.engine.runner import Runner
from weft_server.engine.sequence import Sequence
from weft_server.engine.warmup import dummy_image, resident
from weft_server.protocol import SamplingParams
from weft_server.training.data import Example
from weft_server.training.pack import make_pack

_MAX_SECONDS = 6.0
_REPEATS = 5
_DECODE_CONTEXT = 32
_ADAPTER_RANK = 16
_NUM_ADAPTERS = (1, 4, 8)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured `(features, seconds)` and the median time of a one-sequence decode iteration."""

    samples: list[tuple[PlanFeatures, float]]
    unloaded_decode_s: float


def calibrate(runner: Runner, limits: Limits, arena: AdapterArena, shapes: ModuleShapes) -> Calibration:
    """Run decode batches and prompt chunks of growing size, until done or out of time; then decode batches
    with dummy adapters, and a finetuning window.

    Args:
        runner, limits: what is measured, and how large it may be.
        arena: the runner's, empty; it is so again afterwards.
        shapes: module → (in_features, out_features) of the base.
    """
    deadline = time.perf_counter() + _MAX_SECONDS
    samples: list[tuple[PlanFeatures, float]] = []
    unloaded = 0.0
    for plan in _plans(limits):
        seconds = _measure_sequences(runner, plan)
        samples.append((_features(plan), seconds))
        if len(samples) == 1:
            unloaded = seconds
        if time.perf_counter() > deadline:
            break
    samples += _measure_adapters(runner, limits, arena, shapes)
    samples += _measure_training(runner, limits)
    return Calibration(samples, unloaded)


def _plans(limits: Limits) -> Iterator[StepPlan]:
    for num_sequences in (1, 4, 16, 32):
        if num_sequences <= min(limits.max_num_seqs, limits.num_blocks // 4):
            yield _decode_plan(num_sequences, limits)
    for num_tokens in (16, 64, 128, 256, 512, 1024):
        if num_tokens <= min(limits.max_batch_tokens, limits.max_model_len - 1, limits.capacity_tokens):
            yield _prefill_plan(num_tokens, limits)


def _decode_plan(num_sequences: int, limits: Limits, *, with_adapters: bool = False) -> StepPlan:
    context = min(_DECODE_CONTEXT, limits.max_model_len - 2)
    blocks = limits.num_blocks_for(context + 1)
    segments = tuple(
        Segment(
            sequence_id=f"calibration-{i}",
            kind=SegmentKind.DECODE,
            start=context,
            num_tokens=1,
            adapter_slot=i if with_adapters else None,
            block_ids=tuple((i * blocks + b) % limits.num_blocks for b in range(blocks)),
            samples=True,
        )
        for i in range(num_sequences)
    )
    return StepPlan(iteration=0, forward=segments)


def _prefill_plan(num_tokens: int, limits: Limits) -> StepPlan:
    segment = Segment(
        sequence_id="calibration-0",
        kind=SegmentKind.PREFILL,
        start=0,
        num_tokens=num_tokens,
        adapter_slot=None,
        block_ids=tuple(range(limits.num_blocks_for(num_tokens))),
        samples=True,
    )
    return StepPlan(iteration=0, forward=(segment,))


def _sequence(segment: Segment) -> Sequence:
    length = segment.start + segment.num_tokens
    return Sequence(
        request_id=segment.sequence_id,
        prompt=[0] * length,
        params=SamplingParams(max_tokens=1, temperature=0.0),
        choice_idx=0,
    )


def _measure(runner: Runner, plan: StepPlan) -> float:
    runner.submit(plan, {}).result()
    return median(runner.submit(plan, {}).result().elapsed_s for _ in range(_REPEATS))


def _measure_sequences(runner: Runner, plan: StepPlan) -> float:
    for segment in plan.forward:
        runner.add_sequence(_sequence(segment))
    seconds = _measure(runner, plan)
    for segment in plan.forward:
        runner.remove_sequence(segment.sequence_id)
    return seconds


def _measure_adapters(
    runner: Runner, limits: Limits, arena: AdapterArena, shapes: ModuleShapes
) -> list[tuple[PlanFeatures, float]]:
    """Decode batches in which every sequence has an adapter of its own, as many as there is room for."""
    layers = range(limits.num_layers)
    image = dummy_image(limits.num_layers, shapes, _ADAPTER_RANK, layers=layers, dtype=arena.weights.dtype)
    room = min(
        arena.num_elements // image.num_elements,
        limits.num_adapter_slots,
        limits.max_num_seqs,
        limits.num_blocks // 4,
    )
    samples = []
    for num_adapters in _NUM_ADAPTERS:
        if num_adapters <= room:
            plan = _decode_plan(num_adapters, limits, with_adapters=True)
            with resident(arena, [image] * num_adapters):
                features = replace(_features(plan), adapter_elements=num_adapters * image.num_elements)
                samples.append((features, _measure_sequences(runner, plan)))
    return samples


def _measure_training(runner: Runner, limits: Limits) -> list[tuple[PlanFeatures, float]]:
    """One window forward with its loss head, and all its backward slices, without an adapter: recomputing,
    and with activations kept if the limits ever allow it."""
    num_tokens = min(limits.window_tokens, limits.max_pack_tokens, limits.max_batch_tokens)
    if num_tokens < 2:
        return []
    samples = _measure_pack(runner, limits, num_tokens, keeps_activations=False)
    if limits.max_kept_tokens >= num_tokens:
        samples += _measure_pack(runner, limits, num_tokens, keeps_activations=True)
    return samples


def _measure_pack(
    runner: Runner, limits: Limits, num_tokens: int, *, keeps_activations: bool
) -> list[tuple[PlanFeatures, float]]:
    tokens = torch.zeros(num_tokens, dtype=torch.int64)
    pack = make_pack("calibration", "calibration", [Example(0, 1, tokens, tokens)], device=runner.device)
    segment = Segment(
        sequence_id=pack.pack_id,
        kind=SegmentKind.TRAIN,
        start=0,
        num_tokens=num_tokens,
        adapter_slot=limits.num_adapter_slots - 1,
        block_ids=tuple(range(limits.num_blocks_for(num_tokens))),
        with_loss=True,
        keeps_activations=keeps_activations,
    )
    forward = StepPlan(iteration=0, forward=(segment,))
    layers = range(limits.num_layers)
    slices = tuple(BackwardSlice(0, (pack.pack_id,), layer, 0) for layer in reversed(layers))
    backward = StepPlan(iteration=0, forward=(), backward=slices)
    token_layers = num_tokens * limits.num_layers
    runner.add_pack(pack)
    try:
        return [
            (
                replace(_features(forward), loss_tokens=num_tokens, num_loss_windows=1, num_adapters=0),
                _measure(runner, forward),
            ),
            (
                PlanFeatures(
                    backward_token_layers=token_layers,
                    num_backward_slices=limits.num_layers,
                    num_backward_layers=limits.num_layers,
                    recomputed_token_layers=0 if keeps_activations else token_layers,
                ),
                _measure(runner, backward),
            ),
        ]
    finally:
        runner.remove_pack(pack.pack_id)


def _features(plan: StepPlan) -> PlanFeatures:
    chunks = [s for s in plan.forward if s.num_tokens > 1]
    return PlanFeatures(
        forward_tokens=plan.num_forward_tokens,
        kv_tokens_read=sum(s.start + s.num_tokens for s in plan.forward),
        attention_products=sum(s.num_tokens * (s.start + s.num_tokens) for s in chunks),
        num_sequences=sum(s.samples for s in plan.forward),
        num_adapters=len({s.adapter_slot for s in plan.forward} - {None}),
        num_chunks=len(chunks),
    )
