"""NF4 against bitsandbytes, bit for bit; products and joined weights against the decoded matrices."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from weft_kernels import nf4
from weft_kernels.nf4 import Nf4Weight, can_concatenate, concatenate, reference
from weft_kernels.product import Plan, Tiles, candidates, row_bucket
from weft_server.quant import nf4 as encoder

CASES = [
    ((96, 128), True, 64),
    ((70, 70), True, 64),
    ((33, 66), False, 64),
    ((513, 192), True, 64),
    ((96, 256), True, 128),
    ((7, 5), False, 64),
    ((64, 128), True, 32),
    ((3, 2048), False, 4096),
]
Quantize = Callable[..., tuple[Nf4Weight, Tensor]]


@pytest.fixture
def quantize() -> Quantize:
    """A random weight quantized by bitsandbytes, and its decoding by bitsandbytes."""
    bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

    def make(
        shape: tuple[int, int],
        nested: bool = True,
        block_size: int = 64,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> tuple[Nf4Weight, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        dense = torch.randn(shape, generator=generator).to(dtype)
        codes, state = bnb.quantize_4bit(
            dense, quant_type="nf4", compress_statistics=nested, blocksize=block_size
        )
        scales: dict[str, Any] = {"absmax": state.absmax}
        if nested:
            scales = {
                "absmax_codes": state.absmax,
                "nested_absmax": state.state2.absmax,
                "nested_offset": state.offset.repeat(state.state2.absmax.numel()),
                "nested_map": state.state2.code,
            }
        weight = Nf4Weight(codes.view(-1), shape, dtype, block_size, state.code, **scales)
        return weight, bnb.dequantize_4bit(codes, state)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "nested", "block_size"), CASES)
def test_decoding_is_bit_identical_to_bitsandbytes(
    quantize: Quantize, shape: tuple[int, int], nested: bool, block_size: int, dtype: torch.dtype
) -> None:
    weight, expected = quantize(shape, nested, block_size, dtype)
    assert torch.equal(nf4.dequantize(weight, dtype), expected)


def test_decoding_rounds_to_the_recorded_dtype_first(quantize: Quantize) -> None:
    weight, expected = quantize((32, 64), dtype=torch.bfloat16)
    assert torch.equal(nf4.dequantize(weight, torch.float32), expected.float())
    assert torch.equal(nf4.dequantize(weight, torch.float64), expected.double())


def test_decoding_in_chunks_changes_nothing(quantize: Quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, expected = quantize((70, 70))
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 256)
    assert torch.equal(nf4.dequantize(weight, torch.float32), expected)


def test_products_are_those_of_the_decoded_matrix(quantize: Quantize) -> None:
    weight, dense = quantize((48, 128))
    x, dy, bias = torch.randn(5, 128), torch.randn(5, 48), torch.randn(48)
    torch.testing.assert_close(nf4.nf4_linear(x, weight, bias), x @ dense.T + bias)
    torch.testing.assert_close(nf4.nf4_linear(x, weight), x @ dense.T)
    torch.testing.assert_close(nf4.nf4_input_grad(dy, weight), dy @ dense)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("num_rows", [(256, 128, 64), (128, 64, 70), (7, 256, 64)])
def test_joined_weights_decode_to_the_stacked_matrices(
    quantize: Quantize, num_rows: tuple[int, ...], nested: bool
) -> None:
    parts = [quantize((n, 128), nested, seed=seed) for seed, n in enumerate(num_rows)]
    joined = concatenate([weight for weight, _ in parts])
    assert torch.equal(nf4.dequantize(joined, torch.float32), torch.cat([dense for _, dense in parts]))


def test_joined_weights_stay_nested_where_groups_align(quantize: Quantize) -> None:
    whole, odd = quantize((128, 128))[0], quantize((64, 128))[0]
    assert concatenate([whole, whole, odd]).nested
    assert not concatenate([odd, whole]).nested
    joined = concatenate([whole, odd])
    assert joined.nbytes == whole.nbytes + odd.nbytes - odd.quant_map.nbytes - 256 * 4


def test_weights_that_cannot_be_joined_are_refused(quantize: Quantize) -> None:
    weight = quantize((64, 128))[0]
    for other, message in (
        (quantize((64, 64))[0], "input widths differ"),
        (quantize((64, 128), dtype=torch.float16)[0], "dtype differs"),
        (quantize((64, 128), block_size=128)[0], "block_size differs"),
        (replace(weight, quant_map=weight.quant_map + 1), "code maps differ"),
    ):
        assert not can_concatenate([weight, other])
        with pytest.raises(ValueError, match=message):
            concatenate([weight, other])
    ragged = quantize((3, 5))[0]
    with pytest.raises(ValueError, match="15 elements do not fill blocks of 64"):
        concatenate([ragged, ragged])
    with pytest.raises(ValueError, match="there are none"):
        concatenate([])


def test_a_weight_whose_parts_contradict_each_other_is_refused(quantize: Quantize) -> None:
    weight = quantize((64, 128), nested=False)[0]
    assert weight.absmax is not None
    for change, message in (
        ({"codes": weight.codes[1:]}, r"codes of a \(64, 128\) weight must be \(4096,\)"),
        ({"absmax": weight.absmax.double()}, "absmax"),
        ({"absmax": None}, "absmax_codes is missing"),
        ({"nested_map": torch.zeros(256)}, "makes no sense beside absmax"),
        ({"block_size": 48}, "not a power of two"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(weight, **change)


def test_products_of_other_widths_are_refused(quantize: Quantize) -> None:
    weight = quantize((48, 128))[0]
    with pytest.raises(ValueError, match="width 128"):
        nf4.nf4_linear(torch.zeros(2, 48), weight)
    with pytest.raises(ValueError, match="width 48"):
        nf4.nf4_input_grad(torch.zeros(2, 128), weight)
    with pytest.raises(ValueError, match="bias"):
        nf4.nf4_linear(torch.zeros(2, 128), weight, torch.zeros(47))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "nested", "block_size"), CASES)
def test_fused_decoding_is_bit_identical_to_bitsandbytes(
    quantize: Quantize,
    device: torch.device,
    shape: tuple[int, int],
    nested: bool,
    block_size: int,
    dtype: torch.dtype,
) -> None:
    from weft_kernels.nf4 import fused

    weight, expected = quantize(shape, nested, block_size, dtype)
    assert torch.equal(fused.dequantize(weight.to(device), dtype).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "tiles"),
    [
        (1, Tiles(16, 64, 1, 2, 3)),
        (19, Tiles(16, 32, 3, 1, 3)),
        pytest.param(70, Tiles(64, 128, 2, 8, 3), marks=pytest.mark.slow),
        (3, None),
    ],
)
@pytest.mark.parametrize(("shape", "nested", "block_size"), [*CASES, ((40, 768), True, 64)])
def test_fused_products_equal_the_reference(
    quantize: Quantize,
    device: torch.device,
    shape: tuple[int, int],
    nested: bool,
    block_size: int,
    num_rows: int,
    tiles: Tiles | None,
    dtype: torch.dtype,
) -> None:
    from weft_kernels.nf4 import fused

    weight = quantize(shape, nested, block_size, dtype)[0].to(device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, shape[1], generator=generator).to(device, dtype)
    dy = torch.randn(num_rows, shape[0], generator=generator).to(device, dtype)
    bias = torch.randn(shape[0], generator=generator).to(device, dtype)
    dense = reference.dequantize(weight, torch.float64)
    # Sums differ in order, and are rounded once: allow a few roundings of the sum of magnitudes.
    for actual, expected, magnitude in (
        (
            fused.nf4_linear(x, weight, bias, Plan(tiles)),
            x.double() @ dense.T + bias,
            x.abs().double() @ dense.T.abs() + bias.abs(),
        ),
        (
            fused.nf4_linear(x, weight, None, Plan(tiles)),
            x.double() @ dense.T,
            x.abs().double() @ dense.T.abs(),
        ),
        (
            fused.nf4_input_grad(dy, weight, Plan(tiles and replace(tiles, columns=64))),
            dy.double() @ dense,
            dy.abs().double() @ dense.abs(),
        ),
    ):
        assert actual.dtype == dtype
        eps = torch.finfo(torch.float32).eps * 4
        tolerance = eps * magnitude.max().item() + torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


def test_fused_products_take_rows_that_are_views(quantize: Quantize, device: torch.device) -> None:
    from weft_kernels.nf4 import fused

    weight = quantize((48, 128))[0].to(device)
    wide = torch.randn(9, 129, generator=torch.Generator().manual_seed(2)).to(device)
    plan = Plan(Tiles(16, 64, 1, 2, 3))
    expected = fused.nf4_linear(wide[:, 1:].contiguous(), weight, None, plan)
    assert torch.equal(fused.nf4_linear(wide[:, 1:], weight, None, plan), expected)


def test_values_that_are_not_nf4s_are_read_from_the_weight(quantize: Quantize, device: torch.device) -> None:
    from weft_kernels.nf4 import fused

    weight = quantize((48, 128))[0]
    assert weight.has_nf4_values
    other = replace(weight, quant_map=weight.quant_map.flip(0).contiguous()).to(device)
    assert not other.has_nf4_values
    dense = reference.dequantize(other, torch.float32)
    assert torch.equal(fused.dequantize(other, torch.float32), dense)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(3)).to(device)
    torch.testing.assert_close(fused.nf4_linear(x, other, None, Plan(Tiles(16, 64, 1, 2, 3))), x @ dense.T)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 5, 16, 30, 64, 500])
@pytest.mark.parametrize("nested", [False, True])
def test_fused_equals_reference_in_bfloat16_at_model_shapes(nested: bool, num_rows: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    drawn = torch.randn(6144, 4096, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    packed = encoder.quantize(drawn, double=nested)
    weight, dense = packed.to("cuda"), reference.dequantize(packed, torch.bfloat16).cuda()
    assert torch.equal(nf4.dequantize(weight, torch.bfloat16), dense)
    x = torch.randn(num_rows, 4096, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(num_rows, 6144, device="cuda", dtype=torch.bfloat16)
    bucket = row_bucket(num_rows)
    assert bucket is not None
    for direction, product, rows, expected in (
        ("forward", nf4.nf4_linear, x, x.float() @ dense.float().T),
        ("input_grad", nf4.nf4_input_grad, dy, dy.float() @ dense.float()),
    ):
        tolerance = 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
        for plan in candidates(direction, bucket, weight.shape):
            actual = product(rows, weight, plan=plan)
            torch.testing.assert_close(actual.float(), expected, rtol=0, atol=tolerance)
            assert torch.equal(product(rows, weight, plan=plan), actual)
