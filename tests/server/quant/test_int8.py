"""The int8 encoder against bitsandbytes' row-wise quantization."""

from __future__ import annotations

import pytest
import torch

from weft_kernels.int8 import dequantize
from weft_server.quant import int8

bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


def test_codes_and_scales_are_those_of_bitsandbytes() -> None:
    weight = (torch.randn(37, 65, generator=torch.Generator().manual_seed(1)) * 0.02).half()
    codes, row_absmax, _ = bnb.int8_vectorwise_quant(weight)
    ours = int8.quantize(weight)
    assert torch.allclose(ours.scales * 127, row_absmax.float(), rtol=1e-6)
    assert ((ours.codes.int() - codes.int()).abs() <= 1).all()
    assert (ours.codes == codes).float().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_value_is_within_half_a_step(dtype: torch.dtype) -> None:
    weight = torch.randn(16, 50, generator=torch.Generator().manual_seed(2)).to(dtype)
    ours = int8.quantize(weight)
    error = (dequantize(ours, torch.float64) - weight.double()).abs()
    assert (error <= ours.scales.double()[:, None] * 0.5001).all()
    assert int(ours.codes.min()) >= -127


def test_rows_of_zeros_stay_zero() -> None:
    weight = torch.randn(3, 8)
    weight[1] = 0
    assert torch.equal(dequantize(int8.quantize(weight), torch.float32)[1], torch.zeros(8))


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        int8.quantize(torch.tensor([[1.0, float("nan")]]))
