"""The reference path against PEFT (forward, dropout, gradients) and against autograd in float64."""

import itertools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from weft_kernels.lora import LoraBatch, LoraDropout, dropout_mask, lora_backward, lora_forward

WIDTHS = {0: 65, 1: 33, 2: 130}
MODULES = (0, 1, 2)
RANKS = {
    0: {0: 8, 1: 8, 2: 8},
    1: {0: 3, 2: 17},
    2: {0: 40, 1: 16, 2: 64},
    3: {1: 5},
}


class Projections(nn.Module):
    """Three linear layers on one input, frozen at zero so that only the adapters speak."""

    def __init__(self, in_width: int) -> None:
        super().__init__()
        for module, width in WIDTHS.items():
            self.add_module(f"linear_{module}", nn.Linear(in_width, width, bias=False))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, f"linear_{module}")(x) for module in MODULES], dim=1)


def peft_twin(adapters: Any, slot: int, layer: int) -> nn.Module:
    """A PEFT model that holds the adapter of one slot and layer."""
    entries = {e.module: e for e in adapters.entries[slot] if e.layer == layer}
    config = peft.LoraConfig(
        r=1,
        target_modules=[f"linear_{module}" for module in entries],
        rank_pattern={f"linear_{module}": e.rank for module, e in entries.items()},
        alpha_pattern={f"linear_{module}": e.scale * e.rank for module, e in entries.items()},
    )
    model = peft.get_peft_model(Projections(adapters.in_width), config).to(adapters.table.weights.dtype)
    for module in entries:
        entry = adapters.table.entry(slot, layer, module)
        adapted = model.get_submodule(f"base_model.model.linear_{module}")
        adapted.lora_A["default"].weight.data.copy_(entry.a)
        adapted.lora_B["default"].weight.data.copy_(entry.b.T)
    return model


class FixedMask(nn.Module):
    """PEFT's dropout with our mask in place of torch's random one."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


@pytest.mark.parametrize("dropped", [False, True])
def test_outputs_and_gradients_equal_pefts(
    make_adapters: Callable[..., Any],
    make_dropout: Callable[..., LoraDropout],
    mixed_batch: Callable[..., LoraBatch],
    dropped: bool,
) -> None:
    adapters = make_adapters(RANKS, WIDTHS, 70, torch.float64)
    batch, layer = mixed_batch(), 1
    dropout = make_dropout(100) if dropped else None
    torch.manual_seed(0)
    x = torch.randn(100, 70, dtype=torch.float64)
    dy = torch.randn(100, sum(WIDTHS.values()), dtype=torch.float64)
    y, dx = torch.zeros_like(dy), torch.zeros_like(x)
    grads = adapters.zero_grads([0, 1, 2, 3], torch.float64)
    widths = tuple(WIDTHS.values())
    lora_forward(x, y, adapters.table, layer, MODULES, widths, batch, dropout)
    lora_backward(x, dy, dx, grads, adapters.table, layer, MODULES, widths, batch, dropout)
    for slot, start, end in batch.segments:
        rows = batch.token_idx[start:end]
        if slot not in RANKS:
            continue
        model = peft_twin(adapters, slot, layer)
        entries = {e.module: e for e in adapters.entries[slot] if e.layer == layer}
        for module in entries:
            if dropout is not None:
                mask = dropout_mask(dropout.select(rows), layer, module, 70)
                model.get_submodule(f"base_model.model.linear_{module}").lora_dropout["default"] = FixedMask(
                    mask
                )
        x_rows = x[rows].requires_grad_()
        expected = model(x_rows)
        torch.testing.assert_close(y[rows], expected, rtol=1e-10, atol=1e-10)
        expected.backward(dy[rows])
        torch.testing.assert_close(dx[rows], x_rows.grad, rtol=1e-10, atol=1e-10)
        for module, e in entries.items():
            adapted = model.get_submodule(f"base_model.model.linear_{module}")
            d_a = grads[slot][e.a_offset :][: e.rank * 70].view(e.rank, 70)
            d_b = grads[slot][e.b_offset :][: e.rank * e.out_features].view(e.rank, e.out_features)
            torch.testing.assert_close(d_a, adapted.lora_A["default"].weight.grad, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(d_b, adapted.lora_B["default"].weight.grad.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dropped", [False, True])
def test_backward_equals_autograd_of_forward(
    make_adapters: Callable[..., Any],
    make_dropout: Callable[..., LoraDropout],
    mixed_batch: Callable[..., LoraBatch],
    dropped: bool,
) -> None:
    adapters = make_adapters(RANKS, WIDTHS, 64, torch.float64)
    batch, widths = mixed_batch(), tuple(WIDTHS.values())
    dropout = make_dropout(100) if dropped else None
    torch.manual_seed(1)
    x = torch.randn(100, 64, dtype=torch.float64)
    y, dy = torch.randn(2, 100, sum(widths), dtype=torch.float64)
    dx = torch.zeros_like(x)
    grads = adapters.zero_grads([0, 1, 2, 3], torch.float64)
    lora_backward(x, dy, dx, grads, adapters.table, 0, MODULES, widths, batch, dropout)
    x.requires_grad_()
    adapters.table.weights.requires_grad_()
    out = y.clone()
    lora_forward(x, out, adapters.table, 0, MODULES, widths, batch, dropout)
    out.backward(dy)
    torch.testing.assert_close(dx, x.grad, rtol=1e-12, atol=1e-12)
    for slot, grad in grads.items():
        base = adapters.bases[slot]
        expected = adapters.table.weights.grad[base : base + grad.numel()]
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_only_rows_and_columns_of_adapted_modules_change(
    make_adapters: Callable[..., Any], mixed_batch: Callable[..., LoraBatch]
) -> None:
    adapters = make_adapters(RANKS, WIDTHS, 70, torch.float32)
    batch = mixed_batch()
    y = torch.zeros(100, sum(WIDTHS.values()))
    lora_forward(torch.ones(100, 70), y, adapters.table, 0, MODULES, tuple(WIDTHS.values()), batch)
    columns = dict(zip(MODULES, y.split(tuple(WIDTHS.values()), dim=1), strict=True))
    adapted = {slot: batch.token_idx[start:end] for slot, start, end in batch.segments}
    for slot, module in itertools.product(adapted, MODULES):
        expected = module in RANKS.get(slot, {})
        assert bool(columns[module][adapted[slot]].any()) == expected
    free = torch.ones(100, dtype=torch.bool)
    free[batch.token_idx] = False
    assert free.any()
    assert not y[free].any()


def test_a_frozen_adapter_passes_gradient_to_its_input_only(
    make_adapters: Callable[..., Any], mixed_batch: Callable[..., LoraBatch]
) -> None:
    adapters = make_adapters(RANKS, WIDTHS, 70, torch.float32)
    widths = tuple(WIDTHS.values())
    x, dy, batch = torch.ones(100, 70), torch.ones(100, sum(widths)), mixed_batch()
    both, frozen = torch.zeros(2, 100, 70)
    grads = adapters.zero_grads([0, 1, 2, 3], torch.float32)
    lora_backward(x, dy, both, grads, adapters.table, 0, MODULES, widths, batch)
    only = adapters.zero_grads([1], torch.float32)
    lora_backward(x, dy, frozen, only, adapters.table, 0, MODULES, widths, batch)
    assert torch.equal(both, frozen)
    assert torch.equal(only[1], grads[1])


def test_everything_accumulates(
    make_adapters: Callable[..., Any], mixed_batch: Callable[..., LoraBatch]
) -> None:
    adapters = make_adapters(RANKS, WIDTHS, 70, torch.float64)
    widths = tuple(WIDTHS.values())
    x, dy = torch.randn(100, 70).double(), torch.randn(100, sum(widths)).double()
    batch, dx = mixed_batch(), torch.zeros(100, 70, dtype=torch.float64)
    grads = adapters.zero_grads([0, 2], torch.float64)
    lora_backward(x, dy, dx, grads, adapters.table, 0, MODULES, widths, batch)
    once = {slot: grad.clone() for slot, grad in grads.items()}
    dx_once = dx.clone()
    lora_backward(x, dy, dx, grads, adapters.table, 0, MODULES, widths, batch)
    torch.testing.assert_close(dx, 2 * dx_once)
    for slot, grad in grads.items():
        torch.testing.assert_close(grad, 2 * once[slot])


def test_gradients_in_low_precision_are_summed_in_float32(make_adapters: Callable[..., Any]) -> None:
    adapters = make_adapters({0: {0: 4}}, {0: 32}, 32, torch.bfloat16)
    batch = LoraBatch.build([(0, 0, 4000)], "cpu")
    x = torch.full((4000, 32), 1.0, dtype=torch.bfloat16)
    dy = torch.full((4000, 32), 1.0, dtype=torch.bfloat16)
    grads = adapters.zero_grads([0], torch.float32)
    lora_backward(x, dy, torch.zeros_like(x), grads, adapters.table, 0, (0,), (32,), batch)
    entry = adapters.table.entry(0, 0, 0)
    u = (dy @ entry.b.T).mul_(entry.scale)
    expected = (u.double().T @ x.double()).view(-1)
    torch.testing.assert_close(grads[0][:128].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 70)}, "one row per token"),
        ({"widths": (65, 33, 131)}, "do not make up"),
        ({"layer": 2}, "outside the table"),
        ({"modules": (0, 1, 7)}, "outside the table"),
        ({"batch": LoraBatch.build([(0, 99, 2)], "cpu")}, "row 100"),
        ({"batch": LoraBatch.build([(50, 0, 1)], "cpu")}, "slot 50"),
        ({"dropout": LoraDropout(torch.zeros(3), torch.zeros(3, dtype=torch.int64))}, "one p and one key"),
    ],
)
def test_arguments_that_do_not_belong_together_are_refused(
    make_adapters: Callable[..., Any],
    mixed_batch: Callable[..., LoraBatch],
    change: dict[str, Any],
    message: str,
) -> None:
    adapters = make_adapters(RANKS, WIDTHS, 70, torch.float32)
    arguments = {
        "x": torch.zeros(100, 70),
        "y": torch.zeros(100, sum(WIDTHS.values())),
        "table": adapters.table,
        "layer": 0,
        "modules": MODULES,
        "widths": tuple(WIDTHS.values()),
        "batch": mixed_batch(),
    }
    with pytest.raises(ValueError, match=message):
        lora_forward(**(arguments | change))
