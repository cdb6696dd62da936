"""Fixtures of the kernel tests: the device, and random adapter tables with poisoned gaps.

Without a CUDA device the Triton kernels run in Triton's interpreter. That is decided when triton is first
imported, hence the assignment before anything here imports it.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

from weft_kernels.lora import LoraBatch, LoraDropout, LoraEntry, LoraTable

NUM_LAYERS, NUM_MODULES = 2, 7


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `gpu` tests on machines without one, saying so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where fused kernels can run: the GPU, else the CPU under Triton's interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    from triton.runtime.interpreter import InterpretedFunction

    from weft_kernels.lora.kernels import shrink_kernel

    if not isinstance(shrink_kernel, InterpretedFunction):
        pytest.fail("triton was imported before TRITON_INTERPRET was set: set it before running pytest")
    return torch.device("cpu")


@dataclass
class Adapters:
    """A LoRA table whose every element outside a matrix is NaN, and what it was made of."""

    table: LoraTable
    widths: dict[int, int]
    in_width: int
    sizes: dict[int, int] = field(default_factory=dict)
    bases: dict[int, int] = field(default_factory=dict)
    entries: dict[int, list[LoraEntry]] = field(default_factory=dict)

    def zero_grads(self, slots: Sequence[int], dtype: torch.dtype) -> dict[int, torch.Tensor]:
        device = self.table.weights.device
        return {slot: torch.zeros(self.sizes[slot], dtype=dtype, device=device) for slot in slots}


def _align(num_elements: int) -> int:
    return -(-num_elements // 64) * 64


@pytest.fixture
def make_adapters() -> Callable[..., Adapters]:
    """Builds a table: `ranks[slot]` maps module index to rank, modules not named are absent."""

    def make(
        ranks: dict[int, dict[int, int]],
        widths: dict[int, int],
        in_width: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Adapters:
        generator = torch.Generator().manual_seed(7)
        layouts, sizes = {}, {}
        for slot, by_module in ranks.items():
            layouts[slot], sizes[slot] = _layout(by_module, widths, in_width)
        arena = torch.full((sum(sizes.values()) + 192 * len(ranks) + 64,), torch.nan, dtype=torch.float64)
        num_slots = max(ranks, default=0) + 2
        bases, base = {}, 64
        for slot, entries in layouts.items():
            bases[slot] = base
            for e in entries:
                for offset, width in ((e.a_offset, e.in_features), (e.b_offset, e.out_features)):
                    values = torch.randn(e.rank * width, generator=generator, dtype=torch.float64)
                    arena[base + offset :][: e.rank * width] = values / width**0.5
            base += _align(sizes[slot]) + 128
        table = LoraTable(arena.to(dtype).to(device), num_slots, NUM_LAYERS, NUM_MODULES)
        for slot, entries in layouts.items():
            table.set_slot(slot, bases[slot], entries)
        return Adapters(table, widths, in_width, sizes, bases, layouts)

    return make


def _layout(by_module: dict[int, int], widths: dict[int, int], in_width: int) -> tuple[list[LoraEntry], int]:
    """As adapters are packed: per layer the A's side by side, then the B's, each at a multiple of 64."""
    entries, offset = [], 0
    for layer in range(NUM_LAYERS):
        a_offsets = {}
        for module, rank in by_module.items():
            a_offsets[module] = offset
            offset += _align(rank * in_width)
        for module, rank in by_module.items():
            scale = 0.5 + 0.25 * module + layer
            width = widths[module]
            entries.append(LoraEntry(layer, module, rank, in_width, width, a_offsets[module], offset, scale))
            offset += _align(rank * width)
    return entries, offset


@pytest.fixture
def make_dropout() -> Callable[..., LoraDropout]:
    """Random keys, and a random half of the rows with dropout 0.4."""

    def make(num_rows: int, device: torch.device | str = "cpu") -> LoraDropout:
        generator = torch.Generator().manual_seed(11)
        keys = torch.randint(-(2**62), 2**62, (num_rows,), generator=generator)
        p = torch.rand(num_rows, generator=generator).round() * 0.4
        return LoraDropout(p.to(device), keys.to(device))

    return make


@pytest.fixture
def mixed_batch() -> Callable[[torch.device | str], LoraBatch]:
    """100 rows: five slots, one in several runs, one of a single row, and rows without an adapter."""

    def make(device: torch.device | str = "cpu") -> LoraBatch:
        runs = [(2, 0, 37), (4, 40, 2), (0, 42, 1), (2, 50, 20), (1, 70, 16), (3, 90, 5), (1, 96, 0)]
        batch = LoraBatch.build(runs, device)
        assert batch is not None
        return batch

    return make
