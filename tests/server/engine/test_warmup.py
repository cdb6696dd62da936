"""What the engine runs at start, before anybody waits for it."""

from __future__ import annotations

import contextlib
import itertools
from unittest import mock

import pytest
import torch
import triton

from weft_kernels import lora
from weft_kernels.lora import LoraBatch, LoraDropout, fused
from weft_scheduler.limits import Limits
from weft_server.adapters.arena import AdapterArena
from weft_server.adapters.paths import MODULE_GROUPS, MODULES
from weft_server.cache.kv import KvCache
from weft_server.engine import warmup
from weft_server.engine.calibration import calibrate
from weft_server.engine.runner import Runner
from weft_server.model.decoder import Decoder


@pytest.fixture
def arena(weights) -> AdapterArena:
    return AdapterArena(1 << 18, 16, weights.config.num_layers, dtype=torch.float32, device=weights.device)


def _assert_empty(arena):
    assert not arena.table.ranks.any()
    assert all(arena.table.max_rank(slot) == 0 for slot in range(arena.table.num_slots))


def test_every_tile_runs_once_forward_and_backward_and_leaves_the_arena_empty(arena, weights):
    launched = {"lora_forward": set(), "lora_backward": set()}

    def recording(name):
        run = getattr(warmup, name)

        def record(*args):
            table, _, modules, _, batch, dropout = args[-6:]
            launched[name].add((modules, batch.tile_rows, table.max_rank(0), dropout is not None))
            run(*args)

        return record

    config = weights.config
    with mock.patch.multiple(warmup, **{name: recording(name) for name in launched}):
        warmup.warm_lora(arena, config.num_layers, config.module_shapes)
    groups = ((0, 1, 2), (3,), (4, 5), (6,))
    expected = set(itertools.product(groups, (16, 32, 64), (16, 32, 64), (False, True)))
    assert launched == {"lora_forward": expected, "lora_backward": expected}
    _assert_empty(arena)


def test_the_row_wise_kernels_of_every_op_are_launched(weights):
    names = (
        "add_rms_norm",
        "rms_norm_backward",
        "swiglu",
        "swiglu_backward",
        "write_rotated",
        "rotate_queries",
        "rotate_backward",
        "loss_head",
        "draw",
    )
    with contextlib.ExitStack() as stack:
        spies = [
            stack.enter_context(mock.patch.object(warmup, name, wraps=getattr(warmup, name)))
            for name in names
        ]
        warmup.warm_rows(Decoder(weights, max_positions=8))
    assert [spy.call_count for spy in spies] == [1] * len(names)


def test_an_arena_too_small_for_the_dummy_adapter_is_no_error(weights):
    small = AdapterArena(1 << 14, 2, weights.config.num_layers, dtype=torch.float32, device=weights.device)
    warmup.warm_lora(small, weights.config.num_layers, weights.config.module_shapes)
    _assert_empty(small)


class _Recorder:
    """Stands in for a kernel: what Triton would compile for each launch."""

    def __init__(self, kernel, seen):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        return self.record

    def record(self, *args, **kwargs):
        launch = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        general = (getattr(self.kernel, "kwargs", None) or vars(self.kernel))["do_not_specialize"]
        key = [self.kernel.__name__]
        for name, value in launch.items():
            if isinstance(value, torch.Tensor):
                aligned = value.storage_offset() * value.itemsize % 16 == 0
                key.append((name, value.dtype, aligned))
            elif name.isupper() or name not in self.kernel.arg_names:
                key.append((name, value))
            elif name not in general:
                key.append((name, value == 1, value % 16 == 0))
        self.seen.add(tuple(key))


@pytest.fixture
def compiled(monkeypatch):
    """What is compiled, if every LoRA call runs the kernels; tensors on `meta` have shapes alone."""
    seen = set()
    monkeypatch.setattr(lora, "_use_kernels", lambda *_: True)
    for name in ("shrink_kernel", "expand_kernel", "weight_grad_kernel"):
        monkeypatch.setattr(fused, name, _Recorder(getattr(fused, name), seen))
    return seen


@pytest.mark.parametrize("rank", [1, 8, 16, 20, 33, 64, 100, 256])
def test_no_batch_compiles_what_the_warm_up_has_not(rank, compiled, make):
    config, meta = make.config, torch.device("meta")
    arena = AdapterArena(1 << 20, 4, config.num_layers, dtype=torch.bfloat16, device=meta)
    warmup.warm_lora(arena, config.num_layers, config.module_shapes)
    warmed = set(compiled)
    assert warmed
    image = warmup.dummy_image(
        config.num_layers, config.module_shapes, rank, layers=range(1), dtype=torch.bfloat16
    )
    runs = [[(0, 0, 1)], [(0, 3, 7), (1, 20, 1)], [(1, 0, 17)], [(0, 0, 33), (1, 33, 500)], [(0, 5, 31)]]
    with warmup.resident(arena, [image, image]):
        for batch_runs, has_dropout, is_trained in itertools.product(runs, (False, True), (False, True)):
            _launch(arena, config.module_shapes, batch_runs, has_dropout, is_trained)
    assert compiled == warmed


def _launch(arena, shapes, runs, has_dropout, is_trained):
    meta, num_rows = torch.device("meta"), 600
    batch = LoraBatch.build(runs, meta)
    dropout = None
    if has_dropout:
        dropout = LoraDropout(
            torch.zeros(num_rows, device=meta), torch.zeros(num_rows, dtype=torch.int64, device=meta)
        )
    for group in MODULE_GROUPS:
        modules = tuple(MODULES.index(module) for module in group)
        widths = tuple(shapes[module][1] for module in group)
        x = torch.zeros(num_rows, shapes[group[0]][0], dtype=torch.bfloat16, device=meta)
        y = torch.zeros(num_rows, sum(widths), dtype=torch.bfloat16, device=meta)
        lora.lora_forward(x, y, arena.table, 0, modules, widths, batch, dropout)
        if is_trained:
            grads = {0: torch.zeros(arena.num_elements, device=meta)}
            lora.lora_backward(x, y, x, grads, arena.table, 0, modules, widths, batch, dropout)


@pytest.mark.gpu
def test_after_the_warm_up_serving_and_training_compile_nothing(device, harness, make, monkeypatch):
    if device.type != "cuda":
        pytest.skip("only the CUDA path compiles kernels")
    h, names = harness(), []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda *_, **facts: names.append(facts.get("repr"))
    )
    for rank in (1, 8, 16, 20, 33, 64):
        h.generate(f"r{rank}", make.prompt(5 + rank), adapter=h.store(make.adapter(rank, rank)))
    h.start_job("job", make.dataset((31, 12, 44, 7)), make.spec(total_steps=2))
    dropping = make.spec(total_steps=2, lora=make.lora(dropout=0.3))
    h.start_job("dropping", make.dataset((22, 15, 9)), dropping)
    h.run()
    assert not h.failures()
    assert len(h.losses("job")) == len(h.losses("dropping")) == 2
    assert names == []


def test_calibration_measures_adapters_and_leaves_the_arena_empty(arena, weights):
    config = weights.config
    limits = Limits(
        num_blocks=128,
        block_size=4,
        max_num_seqs=8,
        max_batch_tokens=64,
        max_model_len=160,
        num_adapter_slots=16,
        arena_elements=1 << 18,
        window_tokens=16,
        num_layers=config.num_layers,
        max_train_tokens=512,
    )
    cache = KvCache(
        num_layers=config.num_layers,
        num_blocks=128,
        block_size=4,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
        device=weights.device,
    )
    runner = Runner(Decoder(weights, max_positions=160), cache, arena.table, max_num_seqs=8, window_tokens=16)
    samples = calibrate(runner, limits, arena, config.module_shapes).samples
    measured = {features.num_adapters for features, _ in samples}
    assert {0, 1, 4} <= measured
    assert all(seconds > 0 for _, seconds in samples)
    _assert_empty(arena)
