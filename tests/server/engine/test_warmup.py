"""What the engine runs at start, before anybody waits for it."""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton

from weft_kernels import attention, int8, lora, nf4
from weft_kernels.attention import fused as attention_fused
from weft_kernels.int8 import fused as int8_fused
from weft_kernels.lora import LoraBatch, LoraDropout, fused
from weft_kernels.nf4 import fused as nf4_fused
from weft_kernels.product import splits
from weft_kernels.product.tuning import PlanFile, Tuner
from weft_scheduler.limits import Limits
from weft_server.adapters.arena import AdapterArena
from weft_server.adapters.paths import MODULE_GROUPS, MODULES
from weft_server.cache.kv import KvCache
from weft_server.engine import warmup
from weft_server.engine.calibration import calibrate
from weft_server.engine.runner import Runner
from weft_server.model.decoder import Decoder
from weft_server.quant.encoding import encode
from weft_server.quant.linear import QuantizedLinear


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


class _Launches:
    """Stands in for a kernel and notes the options that its launches were compiled for."""

    def __init__(self, *options):
        self._options, self.seen = options, set()

    def __getitem__(self, grid):
        return lambda *_, **given: self.seen.add(tuple(given[option] for option in self._options))


def test_every_tile_and_option_of_attention_is_launched(weights):
    config = weights.config
    cache = KvCache(
        num_layers=1,
        num_blocks=1,
        block_size=16,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=weights.dtype,
        device=weights.device,
    )
    kernels = {
        "decode_kernel": _Launches("SPLIT"),
        "combine_kernel": _Launches(),
        "chunk_kernel": _Launches("SAVED", "BLOCK_M"),
        "query_grad_kernel": _Launches("BLOCK_M"),
        "key_grad_kernel": _Launches(),
    }
    with (
        mock.patch.object(attention, "_use_kernels", return_value=True),
        mock.patch.multiple(attention_fused, **kernels),
    ):
        warmup.warm_attention(Decoder(weights, max_positions=64), cache)
    assert {name: kernel.seen for name, kernel in kernels.items()} == {
        "decode_kernel": {(False,), (True,)},
        "combine_kernel": {()},
        "chunk_kernel": set(itertools.product((False, True), (64, 128))),
        "query_grad_kernel": {(64,), (128,)},
        "key_grad_kernel": {()},
    }


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
        general = (getattr(self.kernel, "kwargs", None) or vars(self.kernel))["do_not_specialize"] or ()
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


class _Tuning:
    """A tuner's collaborators: of each choice, the candidate of the given index is the fastest."""

    def __init__(self, fastest):
        self.fastest, self.num_measured = fastest, 0

    def measure(self, run):
        run()
        self.num_measured += 1
        return abs(self.num_measured % 2 - self.fastest)

    def tuner(self):
        return Tuner(PlanFile(None, {}), self.measure, max_seconds=1e9)


def _linears(format, shapes, device):  # noqa: A002
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in shapes]
    return [_moved(encode(weight, format=format, dtype=torch.bfloat16), device) for weight in weights]


def _moved(linear, device):
    return QuantizedLinear(linear.packed.to(device), dtype=linear.dtype)


def _weights(layers, device):
    layers = tuple(SimpleNamespace(linears=linears) for linears in layers)
    return SimpleNamespace(layers=layers, dtype=torch.bfloat16, device=device)


def test_linears_of_one_shape_and_format_are_measured_once_and_share_plans():
    shapes, device = [(64, 128), (128, 64)], torch.device("cpu")
    first, second = (_linears("nf4", shapes, device) for _ in range(2))
    dense = encode(torch.ones(64, 128), format="nf4", dtype=torch.bfloat16, expanded=True)
    other = _linears("int8", shapes[:1], device)[0]
    tuning = _Tuning(0)
    warmup.warm_linears(_weights([first, [*second, dense, other]], device), tuning.tuner())
    assert [a.plans for a in first] == [b.plans for b in second]
    assert first[0].plans is second[0].plans
    assert first[0].plans is not first[1].plans
    assert dense.plans is None
    measured = tuning.num_measured
    again = _Tuning(0)
    warmup.warm_linears(_weights([first[:1]], device), again.tuner())
    warmup.warm_linears(_weights([first[1:]], device), again.tuner())
    warmup.warm_linears(_weights([[other]], device), again.tuner())
    assert again.num_measured == measured


@pytest.mark.parametrize("fastest", [0, 1])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_no_product_compiles_what_the_warm_up_has_not(format, fastest, monkeypatch):  # noqa: A002
    seen, meta = set(), torch.device("meta")
    monkeypatch.setattr(nf4, "_use_kernels", lambda *_: True)
    monkeypatch.setattr(int8, "_use_kernels", lambda *_: True)
    for module in (nf4_fused, int8_fused, splits):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, _Recorder(getattr(module, name), seen))
    linears = _linears(format, [(768, 1024), (1024, 320)], meta)
    warmup.warm_linears(_weights([linears], meta), _Tuning(fastest).tuner())
    warmed = set(seen)
    assert warmed
    for linear, num_rows in itertools.product(linears, (1, 2, 7, 16, 17, 48, 65, 129, 400, 513, 1024)):
        x = torch.zeros(num_rows + 1, linear.in_features, dtype=torch.bfloat16, device=meta)
        dy = torch.zeros(num_rows, linear.out_features + 8, dtype=torch.bfloat16, device=meta)
        linear.forward(x[1:])
        linear.input_grad(dy[:, 8:])
    assert seen == warmed


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
