"""NF4 against bitsandbytes, bit for bit; products and joined weights against the decoded matrices."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from weft_kernels import nf4
from weft_kernels.nf4 import Nf4Weight, can_concatenate, concatenate, reference
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


@pytest.mark.parametrize("num_rows", [1, 19, pytest.param(65, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("shape", "nested", "block_size"), CASES)
def test_fused_products_equal_the_reference(
    quantize: Quantize,
    device: torch.device,
    shape: tuple[int, int],
    nested: bool,
    block_size: int,
    num_rows: int,
) -> None:
    from weft_kernels.nf4 import fused

    weight = quantize(shape, nested, block_size)[0].to(device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, shape[1], generator=generator).to(device)
    dy = torch.randn(num_rows, shape[0], generator=generator).to(device)
    bias = torch.randn(shape[0], generator=generator).to(device)
    # The two sum in different orders: allow a few roundings of the sum of magnitudes.
    magnitudes = reference.dequantize(weight, torch.float32).abs()
    for actual, expected, bound in (
        (
            fused.nf4_linear(x, weight, bias),
            reference.nf4_linear(x, weight, bias),
            x.abs() @ magnitudes.T + bias.abs(),
        ),
        (fused.nf4_input_grad(dy, weight), reference.nf4_input_grad(dy, weight), dy.abs() @ magnitudes),
    ):
        tolerance = 4 * torch.finfo(torch.float32).eps * bound.max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 16, 64, 500])
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
    for actual, expected in (
        (nf4.nf4_linear(x, weight), x.float() @ dense.float().T),
        (nf4.nf4_input_grad(dy, weight), dy.float() @ dense.float()),
    ):
        tolerance = 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
        torch.testing.assert_close(actual.float(), expected, rtol=0, atol=tolerance)
