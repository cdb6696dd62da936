"""Bugs that barely move a loss, planted one by one: the exactness checks must see every one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import weft_server.adapters.image as image_module
import weft_server.engine.runner as runner_module
import weft_server.model.decoder as decoder_module
from weft_kernels.attention import make_chunk
from weft_server.training.data import ExampleOrder
from weft_server.training.job import StepReport
from weft_server.training.optimizer import FlatAdamW
from weft_server.training.pack import Pack, PackChunk

LENGTHS = (97, 23, 40, 5)
WINDOW_TOKENS = 16
GRADIENT_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Exact:
    """One optimizer step computed by autograd over whole sequences and by `torch.optim.AdamW`."""

    gradient: Tensor
    loss: float
    num_targets: int
    master: Tensor


@pytest.fixture
def setting(bench, make):
    """The step's inputs and its exact result, computed before anything is broken."""
    config = make.config()
    spec = make.spec(max_grad_norm=0.05, weight_decay=0.1)
    dataset, adapter = make.dataset(LENGTHS, config.vocab_size), make.adapter(config, 5)

    def build():
        b = bench(config, torch.float64, WINDOW_TOKENS)
        b.add_job(dataset, adapter, spec, max_pack_tokens=130)
        return b

    gradient, loss = build().whole_sequence_gradient("job")
    chosen = ExampleOrder(len(dataset), spec.batch_size, spec.seed).of_step(0)
    num_targets = sum(dataset[idx].num_targets for idx in chosen)
    master = torch.nn.Parameter(adapter.weights.to(torch.float64))
    master.grad = gradient / num_targets
    torch.nn.utils.clip_grad_norm_([master], spec.max_grad_norm)
    torch.optim.AdamW([master], lr=spec.learning_rate, weight_decay=spec.weight_decay).step()
    return build, Exact(gradient, loss, num_targets, master.detach())


def _check_step(build: Callable, exact: Exact) -> None:
    """Run one step of a job and compare everything that comes of it.

    Raises:
        AssertionError: something is not what it must be.
    """
    b = build()
    b.accumulate_gradients("job")
    optimizer = b.jobs["job"].optimizer
    scale = exact.gradient.abs().max()
    gradient = optimizer.grad.clone()
    torch.testing.assert_close(gradient / scale, exact.gradient / scale, rtol=0, atol=GRADIENT_TOLERANCE)
    report = b.finish_step("job").steps["job"]
    assert isinstance(report, StepReport), report
    assert report.loss == pytest.approx(exact.loss / exact.num_targets, rel=1e-12)
    norm = float(torch.linalg.vector_norm(exact.gradient)) / exact.num_targets
    assert report.grad_norm == pytest.approx(norm, rel=1e-9)
    torch.testing.assert_close(optimizer.master.detach(), exact.master, rtol=0, atol=1e-9)


def test_the_step_is_exact_when_nothing_is_broken(setting):
    _check_step(*setting)


# ---------------------------------------------------------------- mutants


def _cross_window_gradient_dropped(patch):
    backward = decoder_module.attention_backward

    def own_window_only(d_out, saved, targets):
        earlier = []
        for chunk, target in zip(saved.batch.chunks, targets, strict=True):
            keys = slice(target.first_key, target.first_key + chunk.num_keys - chunk.num_tokens)
            earlier += [(d[keys], d[keys].clone()) for d in (target.d_k, target.d_v)]
        d_q = backward(d_out, saved, targets)
        for accumulated, before in earlier:
            accumulated.copy_(before)
        return d_q

    patch.setattr(decoder_module, "attention_backward", own_window_only)


def _gradient_scaled_by_8(patch):
    loss_head = runner_module.loss_head

    def scaled(*args, **kwargs):
        head = loss_head(*args, **kwargs)
        return replace(head, d_hidden=head.d_hidden * 8)

    patch.setattr(runner_module, "loss_head", scaled)


def _half_of_the_examples_ignored(patch):
    of_step = ExampleOrder.of_step
    patch.setattr(ExampleOrder, "of_step", lambda *args: (chosen := of_step(*args))[: len(chosen) // 2])


def _frozen(patch, side):
    backward = decoder_module.lora_backward

    def one_side(x, dy, dx, grads, table, layer, modules, widths, batch, dropout=None):
        before = {slot: grad.clone() for slot, grad in grads.items()}
        backward(x, dy, dx, grads, table, layer, modules, widths, batch, dropout)
        for slot, grad in grads.items():
            for module in modules:
                entry = table.entry(slot, layer, module)
                if entry is not None:
                    offset, weight = {"a": (entry.a_offset, entry.a), "b": (entry.b_offset, entry.b)}[side]
                    part = slice(offset, offset + weight.numel())
                    grad[part] = before[slot][part]

    patch.setattr(decoder_module, "lora_backward", one_side)


def _scale_dropped(patch):
    entries = image_module.table_entries
    patch.setattr(
        image_module, "table_entries", lambda adapter: tuple(replace(e, scale=1.0) for e in entries(adapter))
    )


def _loss_divided_by_all_tokens(patch):
    step = FlatAdamW.step
    patch.setattr(
        FlatAdamW, "step", lambda self, number, _num_targets, valid: step(self, number, sum(LENGTHS), valid)
    )


def _loss_averaged_over_packs(patch):
    step = FlatAdamW.step
    patch.setattr(
        FlatAdamW, "step", lambda self, number, num_targets, valid: step(self, number, num_targets * 2, valid)
    )


def _attention_across_examples(patch):
    def one_chunk(self, first, end, row_start, block_table, block_size):
        return [PackChunk(make_chunk(row_start, end - first, 0, end, block_table, block_size), 0)]

    patch.setattr(Pack, "chunks", one_chunk)


def _clipping_forgotten(patch):
    init = FlatAdamW.__init__
    patch.setattr(
        FlatAdamW, "__init__", lambda self, master, spec: init(self, master, replace(spec, max_grad_norm=0.0))
    )


def _first_window_without_loss(patch):
    heads = runner_module.Runner._run_loss_heads

    def later_windows(self, batch, hidden):
        kept = tuple(p for p in batch.segments if p.segment.start > 0)
        heads(self, replace(batch, segments=kept), hidden)

    patch.setattr(runner_module.Runner, "_run_loss_heads", later_windows)


MUTANTS = {
    "cross-window gradient dropped": _cross_window_gradient_dropped,
    "gradient scaled by 8": _gradient_scaled_by_8,
    "half of the examples ignored": _half_of_the_examples_ignored,
    "A frozen": lambda patch: _frozen(patch, "a"),
    "B frozen": lambda patch: _frozen(patch, "b"),
    "scale dropped": _scale_dropped,
    "loss divided by all tokens": _loss_divided_by_all_tokens,
    "loss averaged over packs": _loss_averaged_over_packs,
    "attention across examples": _attention_across_examples,
    "clipping forgotten": _clipping_forgotten,
    "first window without loss": _first_window_without_loss,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_checks_see(mutant, setting, monkeypatch):
    MUTANTS[mutant](monkeypatch)
    with pytest.raises(AssertionError):
        _check_step(*setting)
