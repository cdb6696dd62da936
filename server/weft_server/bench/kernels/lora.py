"""Batched LoRA, forward and backward, over an adapter arena as an engine has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft_kernels.lora import LoraBatch, LoraTable, lora_backward, lora_forward
from weft_server.adapters.arena import AdapterArena
from weft_server.adapters.image import HostImage
from weft_server.adapters.packed import PackedAdapter
from weft_server.adapters.paths import MODULE_GROUPS, MODULES
from weft_server.bench.kernels.case import OpCase, Subject, relative_error
from weft_server.bench.kernels.vllm_lora import vllm_lora

_NAMES = ("qkv", "o", "gate, up", "down")
_MIXED_RANKS = (8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows over adapters: `runs` are `(slot, first row, rows)`; adapter `i` is in slot `i`."""

    name: str
    table: LoraTable
    adapters: Sequence[PackedAdapter]
    runs: Sequence[tuple[int, int, int]]

    @property
    def num_rows(self) -> int:
        """Rows of the flat batch."""
        return sum(rows for _, _, rows in self.runs)


def cases(subject: Subject) -> Iterator[OpCase]:
    """A decode batch of distinct adapters, at equal and mixed ranks; a mixed batch over one and several."""
    num = subject.num_decode
    equal = _batch(subject, [16] * num, 1)
    mixed = _batch(subject, [_MIXED_RANKS[idx % len(_MIXED_RANKS)] for idx in range(num)], 1)
    one = _batch(subject, [16], subject.num_mixed)
    several = _batch(subject, [16] * 8, subject.num_mixed // 8)
    for group in range(len(MODULE_GROUPS)):
        yield from (_forward(subject, batch, group) for batch in (equal, mixed, one, several))
        yield from (_backward(subject, batch, group) for batch in (one, several))


def _batch(subject: Subject, ranks: Sequence[int], rows_each: int) -> Batch:
    adapters = [subject.model.adapter(idx, rank) for idx, rank in enumerate(ranks)]
    images = [HostImage.build(adapter, subject.dtype) for adapter in adapters]
    size = sum(image.num_elements for image in images)
    arena = AdapterArena(size, len(images), 1, dtype=subject.dtype, device=subject.device)
    offset = 0
    for slot, image in enumerate(images):
        arena.load(slot, offset, image)
        offset += image.num_elements
    kinds = "rank 16" if len(set(ranks)) == 1 else f"ranks {'/'.join(map(str, sorted(set(ranks))))}"
    noun = "adapter" if len(ranks) == 1 else "adapters"
    name = f"{len(ranks)} {noun} of {kinds}, {len(ranks) * rows_each} rows"
    runs = [(slot, slot * rows_each, rows_each) for slot in range(len(ranks))]
    return Batch(name, arena.table, adapters, runs)


def _forward(subject: Subject, batch: Batch, group: int) -> OpCase:
    modules, widths, width_in = _group(subject, group)
    x, y = subject.randn(batch.num_rows, width_in), subject.randn(batch.num_rows, sum(widths))
    lora = LoraBatch.build(batch.runs, subject.device)
    assert lora is not None  # every batch has rows

    def run() -> None:
        lora_forward(x, y, batch.table, 0, modules, widths, lora)

    def error() -> float:
        # Added to zero: an update's error would hide behind a large y.
        y.zero_()
        run()
        return relative_error(y, _update(subject, batch, group, x.float()))

    elements = _elements(batch, group)
    return OpCase(
        op="lora forward",
        shape=f"{_NAMES[group]}, {batch.name}",
        num_bytes=(elements + x.numel() + 2 * y.numel()) * x.element_size(),
        flops=_flops(batch, group),
        run=run,
        error=error,
        peers={"vLLM": vllm_lora(batch.adapters, batch.runs, modules, x, y)} if subject.on_gpu else {},
    )


def _backward(subject: Subject, batch: Batch, group: int) -> OpCase:
    modules, widths, width_in = _group(subject, group)
    x, dy = subject.randn(batch.num_rows, width_in), subject.randn(batch.num_rows, sum(widths))
    dx = torch.zeros_like(x)
    lora = LoraBatch.build(batch.runs, subject.device)
    assert lora is not None  # every batch has rows
    grads = {
        slot: torch.zeros(adapter.num_elements, device=subject.device)
        for slot, adapter in enumerate(batch.adapters)
    }

    def run() -> None:
        lora_backward(x, dy, dx, grads, batch.table, 0, modules, widths, lora)

    def error() -> float:
        dx.zero_()
        for grad in grads.values():
            grad.zero_()
        run()
        expected_dx, expected = _gradients(subject, batch, group, x.float(), dy.float())
        actual = torch.cat([grads[slot] for slot in range(len(batch.adapters))])
        return max(relative_error(dx, expected_dx), relative_error(actual, expected))

    elements = _elements(batch, group)
    return OpCase(
        op="lora backward",
        shape=f"{_NAMES[group]}, {batch.name}",
        num_bytes=(elements + 3 * x.numel() + dy.numel()) * x.element_size() + 8 * elements,
        # dy Bᵀ and x Aᵀ again, then dx, dA and dB: 2.5 times the forward's.
        flops=2.5 * _flops(batch, group),
        run=run,
        error=error,
    )


def _group(subject: Subject, group: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Module indices, output widths and input width of a group."""
    shapes = subject.model.config.module_shapes
    names = MODULE_GROUPS[group]
    return (
        tuple(MODULES.index(name) for name in names),
        tuple(shapes[name][1] for name in names),
        shapes[names[0]][0],
    )


def _tensors(subject: Subject, adapter: PackedAdapter, module: str) -> tuple[Tensor, Tensor, float]:
    """A, B and scale as the arena has them, in fp32: the values that the definition starts from."""
    weights = adapter.weights.to(subject.dtype).float()
    lora_a, lora_b = adapter.layout.a(weights, 0, module), adapter.layout.b(weights, 0, module)
    return lora_a.to(subject.device), lora_b.to(subject.device), adapter.scales[0, module]


def _update(subject: Subject, batch: Batch, group: int, x: Tensor) -> Tensor:
    """The definition: every adapter's `s (x Aᵀ) B`, its modules side by side."""
    updates = []
    for slot, first, rows in batch.runs:
        part = x[first : first + rows]
        columns = []
        for module in MODULE_GROUPS[group]:
            lora_a, lora_b, scale = _tensors(subject, batch.adapters[slot], module)
            columns.append(scale * (part @ lora_a.t()) @ lora_b)
        updates.append(torch.cat(columns, dim=1))
    return torch.cat(updates)


@torch.enable_grad()
def _gradients(subject: Subject, batch: Batch, group: int, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dx, and the flat gradients one behind the other, by torch's autograd over the definition."""
    all_dx, all_flat = [], []
    for slot, first, rows in batch.runs:
        part = x[first : first + rows].clone().requires_grad_()
        adapter = batch.adapters[slot]
        flat = torch.zeros(adapter.num_elements, device=subject.device)
        columns, leaves = [], []
        for module in MODULE_GROUPS[group]:
            lora_a, lora_b, scale = _tensors(subject, adapter, module)
            leaves.append((module, lora_a.requires_grad_(), lora_b.requires_grad_()))
            columns.append(scale * (part @ lora_a.t()) @ lora_b)
        torch.cat(columns, dim=1).backward(dy[first : first + rows])  # type: ignore[no-untyped-call]
        for module, lora_a, lora_b in leaves:
            assert lora_a.grad is not None
            assert lora_b.grad is not None
            adapter.layout.a(flat, 0, module).copy_(lora_a.grad)
            adapter.layout.b(flat, 0, module).copy_(lora_b.grad)
        assert part.grad is not None
        all_dx.append(part.grad)
        all_flat.append(flat)
    return torch.cat(all_dx), torch.cat(all_flat)


def _elements(batch: Batch, group: int) -> int:
    """Elements of the group's A's and B's over all adapters of the batch."""
    names = MODULE_GROUPS[group]
    return sum(
        entry.num_parameters
        for adapter in batch.adapters
        for entry in adapter.layout
        if entry.module_name in names
    )


def _flops(batch: Batch, group: int) -> float:
    names = MODULE_GROUPS[group]
    return sum(
        2.0 * rows * entry.num_parameters
        for slot, _, rows in batch.runs
        for entry in batch.adapters[slot].layout
        if entry.module_name in names
    )
