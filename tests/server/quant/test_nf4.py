"""The NF4 encoder against bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weft_kernels.nf4 import NESTED_BLOCK_SIZE, dequantize
from weft_server.quant import nf4

bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[0, ::3] = 0
    return weight.to(dtype)


def test_the_value_tables_are_those_of_bitsandbytes() -> None:
    assert torch.equal(nf4.nf4_map(), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (7, 9), (33, 50), (96, 128), (513, 260)], ids=str)
@pytest.mark.parametrize("block_size", [64, 128])
def test_codes_and_block_scales_are_bit_identical(
    dtype: torch.dtype, shape: tuple[int, int], block_size: int
) -> None:
    weight = random_weight(shape, dtype)
    codes, state = bnb.quantize_4bit(
        weight, blocksize=block_size, quant_type="nf4", compress_statistics=False
    )
    ours = nf4.quantize(weight, block_size=block_size, double=False)
    assert torch.equal(ours.codes, codes.flatten())
    assert ours.absmax is not None
    assert torch.equal(ours.absmax, state.absmax)
    if shape[1] % 2 == 0:
        assert torch.equal(dequantize(ours, dtype), bnb.dequantize_4bit(codes, state))


def weight_of(distribution: str, shape: tuple[int, int]) -> Tensor:
    """A matrix whose block scales are spread in a way that the name tells."""
    generator = torch.Generator().manual_seed(shape[0])
    normal = torch.randn(shape, generator=generator)
    match distribution:
        case "normal":
            return normal * 0.02
        case "uniform":
            return torch.rand(shape, generator=generator) - 0.5
        case "heavy-tailed":
            return normal**5
        case "outlier rows":
            return normal * torch.where(torch.arange(shape[0]) % 50 == 0, 100.0, 0.02)[:, None]
        case "mostly zero":
            return normal * (torch.rand(shape, generator=generator) < 0.01)
    raise ValueError(distribution)


def assert_encoded_as_by_bitsandbytes(weight: Tensor) -> None:
    """Every stored value is equal: nothing is left to rounding."""
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = nf4.quantize(weight)
    assert torch.equal(ours.codes, codes.flatten())
    assert ours.absmax_codes is not None
    assert ours.nested_absmax is not None
    assert ours.nested_offset is not None
    assert torch.equal(ours.nested_offset, state.offset.expand_as(ours.nested_offset))
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert torch.equal(ours.absmax_codes, state.absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (64, 64), (33, 50), (513, 260), (256, 1024)], ids=str)
def test_double_quantization_is_bit_identical(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    assert_encoded_as_by_bitsandbytes(random_weight(shape, dtype))


@pytest.mark.parametrize("distribution", ["normal", "uniform", "heavy-tailed", "outlier rows", "mostly zero"])
@pytest.mark.parametrize("shape", [(2048, 1024), (1001, 640)], ids=str)
def test_double_quantization_is_bit_identical_however_scales_are_spread(
    distribution: str, shape: tuple[int, int]
) -> None:
    assert_encoded_as_by_bitsandbytes(weight_of(distribution, shape))


@pytest.mark.parametrize("constant", [0.0, 0.25, -3.0])
def test_scales_that_are_all_alike_are_encoded_as_by_bitsandbytes(constant: float) -> None:
    assert_encoded_as_by_bitsandbytes(torch.full((257, 128), constant))


def test_scales_beside_every_boundary_between_levels_get_the_codes_of_bitsandbytes() -> None:
    boundaries = ((torch.arange(65536.0, dtype=torch.float64) - 0.5) / 32767.5 - 1).float()
    beside = torch.cat([(boundaries.view(torch.int32) + ulps).view(torch.float32) for ulps in range(-2, 3)])
    beside = beside[beside.abs() <= 1]
    beside = beside[: beside.numel() - beside.numel() % (NESTED_BLOCK_SIZE - 1)]
    # A leading one in every group makes its scale one.
    groups = torch.nn.functional.pad(beside.view(-1, NESTED_BLOCK_SIZE - 1), (1, 0), value=1.0)
    codes, state = bnb.quantize_blockwise(groups, blocksize=NESTED_BLOCK_SIZE, code=nf4.dynamic_map())
    our_codes, our_scales = nf4.encode_scales(groups.flatten(), nf4.dynamic_map())
    assert torch.equal(our_scales, state.absmax)
    assert torch.equal(our_codes, codes.flatten())


def test_a_double_quantized_weight_decodes_as_bitsandbytes_decodes_it() -> None:
    weight = random_weight((130, 192), torch.bfloat16)
    ours = nf4.quantize(weight)
    assert ours.nested_offset is not None
    state = bnb.QuantState(
        absmax=ours.absmax_codes,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=64,
        code=ours.quant_map,
        quant_type="nf4",
        offset=ours.nested_offset[0],
        state2=bnb.QuantState(
            absmax=ours.nested_absmax, blocksize=256, code=ours.nested_map, dtype=torch.float32
        ),
    )
    theirs = bnb.dequantize_4bit(ours.codes[:, None], state)
    assert torch.equal(dequantize(ours, torch.bfloat16), theirs)
    assert torch.equal(dequantize(ours, torch.float64), theirs.double())


def test_blocks_of_zeros_stay_zero() -> None:
    weight = torch.zeros(4, 80)
    assert torch.equal(dequantize(nf4.quantize(weight, double=False), torch.float32), weight)
    assert torch.equal(dequantize(nf4.quantize(weight), torch.float32), weight)


def test_large_weights_are_encoded_in_chunks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight((65, 100), torch.float32)
    whole = nf4.quantize(weight)
    monkeypatch.setattr(nf4, "_CHUNK_ELEMENTS", 1024)
    chunked = nf4.quantize(weight)
    assert torch.equal(whole.codes, chunked.codes)
    assert torch.equal(dequantize(whole, torch.float32), dequantize(chunked, torch.float32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    weight = random_weight((8, 64), torch.float32)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        nf4.quantize(weight)


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        nf4.quantize(torch.zeros(2, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match="matrices"):
        nf4.quantize(torch.zeros(64))
    with pytest.raises(ValueError, match="block_size=48"):
        nf4.quantize(torch.zeros(2, 64), block_size=48)
