"""The Triton kernels equal the reference: on a CUDA device where there is one, else in Triton's interpreter.

The arena's gaps and all scratch memory are NaN, so that whatever is read outside a matrix shows.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from weft_kernels.lora import LoraBatch, LoraBuffer, LoraDropout, reference

WIDTHS = {0: 65, 1: 33, 2: 130, 3: 40, 4: 16}
RANKS = {
    0: {0: 8, 1: 8, 2: 8, 3: 8, 4: 8},
    1: {0: 3, 2: 17, 4: 1},
    2: {0: 70, 1: 16, 2: 64, 3: 33},
    3: {1: 5},
}


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within a few roundings of the largest value: the two sum in different orders."""
    num_roundings = 8 if dtype == torch.float32 else 4
    tolerance = num_roundings * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def check(
    adapters: Any,
    batch: LoraBatch,
    modules: tuple[int, ...],
    num_rows: int,
    dtype: torch.dtype,
    dropout: LoraDropout | None,
    trained: list[int],
) -> None:
    from weft_kernels.lora import fused

    device = adapters.table.weights.device
    widths = tuple(adapters.widths[module] for module in modules)
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    x, y, dy = (
        random(num_rows, adapters.in_width),
        random(num_rows, sum(widths)),
        random(num_rows, sum(widths)),
    )
    dx = random(num_rows, adapters.in_width)
    group = (adapters.table, 1, modules, widths, batch, dropout)
    results = []
    for path in (reference, fused):
        out, d_in = y.clone(), dx.clone()
        grads = adapters.zero_grads(trained, torch.float32)
        path.lora_forward(x, out, *group)
        path.lora_backward(x, dy, d_in, grads, *group)
        results.append((out, d_in, grads))
    (y_ref, dx_ref, grads_ref), (y_fused, dx_fused, grads_fused) = results
    assert not torch.equal(y_ref, y)
    assert_equal_up_to_rounding(y_fused, y_ref, dtype)
    assert_equal_up_to_rounding(dx_fused, dx_ref, dtype)
    for slot in trained:
        assert_equal_up_to_rounding(grads_fused[slot], grads_ref[slot], dtype)
    untouched = torch.ones(num_rows, dtype=torch.bool, device=device)
    untouched[batch.token_idx] = False
    assert torch.equal(y_fused[untouched], y[untouched])
    assert torch.equal(dx_fused[untouched], dx[untouched])


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(
    ("dtype", "modules"),
    [
        (torch.float32, (0, 1, 2)),
        (torch.float32, (0, 1, 2, 3, 4)),
        (torch.float16, (1, 3)),
        pytest.param(torch.float16, (0, 1, 2), marks=pytest.mark.slow),
        pytest.param(torch.float16, (0, 1, 2, 3, 4), marks=pytest.mark.slow),
        pytest.param(torch.float32, (0,), marks=pytest.mark.slow),
        pytest.param(torch.float32, (1, 3), marks=pytest.mark.slow),
    ],
)
def test_fused_equals_reference_on_odd_shapes_and_mixed_ranks(
    make_adapters: Callable[..., Any],
    make_dropout: Callable[..., LoraDropout],
    mixed_batch: Callable[..., LoraBatch],
    device: torch.device,
    dtype: torch.dtype,
    modules: tuple[int, ...],
    dropped: bool,
) -> None:
    adapters = make_adapters(RANKS, WIDTHS, 70, dtype, device)
    dropout = make_dropout(100, device) if dropped else None
    check(adapters, mixed_batch(device), modules, 100, dtype, dropout, trained=[0, 1, 2])


@pytest.mark.parametrize("num_rows", [1, 2, 15, 16, 17, 65])
def test_fused_equals_reference_around_tile_edges(
    make_adapters: Callable[..., Any], device: torch.device, num_rows: int
) -> None:
    adapters = make_adapters({0: {0: 16}}, {0: 128}, 128, torch.float32, device)
    batch = LoraBatch.build([(0, 0, num_rows)], device)
    assert batch is not None
    check(adapters, batch, (0,), num_rows, torch.float32, None, trained=[0])


def test_fused_decode_batch_of_one_row_per_adapter(
    make_adapters: Callable[..., Any], device: torch.device
) -> None:
    ranks = {slot: {0: slot + 1, 1: 8} for slot in range(12)}
    adapters = make_adapters(ranks, {0: 48, 1: 48}, 64, torch.float32, device)
    batch = LoraBatch.build([(slot, 11 - slot, 1) for slot in range(12)], device)
    assert batch is not None
    check(adapters, batch, (0, 1), 12, torch.float32, None, trained=[3])


def test_one_fixed_buffer_serves_batches_of_different_shapes(
    make_adapters: Callable[..., Any], device: torch.device
) -> None:
    from weft_kernels.lora import fused

    adapters = make_adapters(RANKS, WIDTHS, 70, torch.float32, device)
    buffer = LoraBuffer(max_rows=40, max_tiles=6, tile_rows=16, device=device)
    x = torch.randn(50, 70, generator=torch.Generator().manual_seed(5)).to(device)
    for runs in ([(0, 3, 20), (2, 30, 9)], [(1, 49, 1)], [(3, 0, 16), (1, 20, 2), (0, 22, 1)]):
        batch = LoraBatch.build(runs, device, buffer)
        assert batch is not None
        assert batch.tables[0].data_ptr() == buffer.tiles.data_ptr()
        ys, grads, dxs = [], [], []
        for path in (reference, fused):
            ys.append(torch.zeros(50, 98, device=device))
            dxs.append(torch.zeros(50, 70, device=device))
            grads.append(adapters.zero_grads([1], torch.float32))
            own = LoraBatch.build(runs, device) if path is reference else batch
            group = (adapters.table, 0, (0, 1), (65, 33), own)
            path.lora_forward(x, ys[-1], *group)
            path.lora_backward(x, ys[0], dxs[-1], grads[-1], *group)
        assert_equal_up_to_rounding(ys[1], ys[0], torch.float32)
        assert_equal_up_to_rounding(dxs[1], dxs[0], torch.float32)
        assert_equal_up_to_rounding(grads[1][1], grads[0][1], torch.float32)


def test_a_batch_that_does_not_fit_its_buffer_is_refused(device: torch.device) -> None:
    buffer = LoraBuffer(max_rows=8, max_tiles=2, tile_rows=16, device=device)
    with pytest.raises(ValueError, match="9 rows do not fit the buffer's 8"):
        LoraBatch.build([(0, 0, 9)], device, buffer)
    with pytest.raises(ValueError, match="9 tile values do not fit the buffer's 6"):
        LoraBatch.build([(0, 0, 1), (1, 1, 1), (2, 2, 1)], device, buffer)


def test_fused_handles_rank_256(make_adapters: Callable[..., Any], device: torch.device) -> None:
    adapters = make_adapters({0: {0: 256}, 1: {0: 200}}, {0: 96}, 80, torch.float32, device)
    batch = LoraBatch.build([(0, 0, 9), (1, 9, 4)], device)
    assert batch is not None
    check(adapters, batch, (0,), 13, torch.float32, None, trained=[0, 1])


def test_fused_leaves_everything_alone_where_nothing_is_adapted(
    make_adapters: Callable[..., Any], device: torch.device
) -> None:
    from weft_kernels.lora import fused

    adapters = make_adapters({0: {0: 4}}, WIDTHS, 64, torch.float32, device)
    batch = LoraBatch.build([(1, 0, 8)], device)
    mixed = LoraBatch.build([(0, 0, 8), (1, 8, 2)], device)
    y, x = torch.full((10, 130), torch.nan, device=device), torch.ones(10, 64, device=device)
    zeros = torch.zeros_like(y)
    for candidate in (batch, mixed):
        assert candidate is not None
        out = zeros.clone()
        fused.lora_forward(x, out, adapters.table, 0, (2,), (130,), candidate)
        assert torch.equal(out, zeros)


def test_fused_accepts_rows_of_a_wider_matrix(
    make_adapters: Callable[..., Any], mixed_batch: Callable[..., LoraBatch], device: torch.device
) -> None:
    from weft_kernels.lora import fused

    adapters = make_adapters(RANKS, WIDTHS, 70, torch.float32, device)
    wide = torch.randn(100, 90, generator=torch.Generator().manual_seed(5)).to(device)
    x = wide[:, 3:73]
    outs = torch.zeros(2, 100, 65, device=device)
    reference.lora_forward(x, outs[0], adapters.table, 0, (0,), (65,), mixed_batch(device))
    fused.lora_forward(x, outs[1], adapters.table, 0, (0,), (65,), mixed_batch(device))
    assert_equal_up_to_rounding(outs[1], outs[0], torch.float32)


def test_fused_refuses_gradients_it_cannot_accumulate(
    make_adapters: Callable[..., Any], device: torch.device
) -> None:
    from weft_kernels.lora import fused

    adapters = make_adapters({0: {0: 4}}, {0: 32}, 64, torch.float32, device)
    batch = LoraBatch.build([(0, 0, 2)], device)
    x, dy = torch.ones(2, 64, device=device), torch.ones(2, 32, device=device)
    grads = adapters.zero_grads([0], torch.float64)
    with pytest.raises(ValueError, match="slot 0 must be float32"):
        fused.lora_backward(x, dy, x.clone(), grads, adapters.table, 0, (0,), (32,), batch)


@pytest.mark.gpu
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("modules", "in_width"), [((0, 1, 2), 4096), ((4, 5), 4096), ((6,), 14336)])
def test_fused_equals_reference_in_bfloat16_at_model_shapes(
    make_adapters: Callable[..., Any],
    make_dropout: Callable[..., LoraDropout],
    modules: tuple[int, ...],
    in_width: int,
    dropped: bool,
) -> None:
    widths = {0: 4096, 1: 1024, 2: 1024, 4: 14336, 5: 14336, 6: 4096}
    ranks = {slot: dict.fromkeys(modules, rank) for slot, rank in enumerate((8, 16, 64, 128))}
    adapters = make_adapters(ranks, widths, in_width, torch.bfloat16, "cuda")
    batch = LoraBatch.build([(0, 0, 1), (1, 1, 1), (2, 2, 512), (3, 600, 100), (0, 700, 33)], "cuda")
    assert batch is not None
    dropout = make_dropout(800, "cuda") if dropped else None
    check(adapters, batch, modules, 800, torch.bfloat16, dropout, trained=[0, 2, 3])


@pytest.mark.gpu
def test_fused_gradients_are_bit_identical_from_run_to_run(
    make_adapters: Callable[..., Any], mixed_batch: Callable[..., LoraBatch]
) -> None:
    from weft_kernels.lora import fused

    adapters = make_adapters(RANKS, WIDTHS, 70, torch.bfloat16, "cuda")
    x = torch.randn(100, 70, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(100, 65, device="cuda", dtype=torch.bfloat16)
    runs = []
    for _ in range(5):
        grads = adapters.zero_grads([0, 2], torch.float32)
        group = (adapters.table, 0, (0,), (65,), mixed_batch("cuda"))
        fused.lora_backward(x, dy, torch.zeros_like(x), grads, *group)
        runs.append(torch.cat(list(grads.values())))
    assert all(torch.equal(run, runs[0]) for run in runs)
