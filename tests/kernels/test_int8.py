"""Int8 weights: decoding and products against plain arithmetic in float64."""

import pytest
import torch

from weft_kernels import int8
from weft_kernels.int8 import Int8Weight


@pytest.fixture
def weight() -> Int8Weight:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (33, 20), generator=generator).to(torch.int8)
    return Int8Weight(codes, torch.rand(33, generator=generator) / 127)


def test_decoding_is_the_float32_product_rounded_once(weight: Int8Weight) -> None:
    exact = weight.codes.double() * weight.scales.double()[:, None]
    assert torch.equal(int8.dequantize(weight, torch.float32), exact.float())
    assert torch.equal(int8.dequantize(weight, torch.bfloat16), exact.float().bfloat16())


def test_products_are_those_of_the_decoded_matrix(weight: Int8Weight) -> None:
    dense = weight.codes.double() * weight.scales.double()[:, None]
    x, dy, bias = torch.randn(4, 20), torch.randn(4, 33), torch.randn(33)
    torch.testing.assert_close(int8.int8_linear(x, weight, bias), (x.double() @ dense.T + bias).float())
    torch.testing.assert_close(int8.int8_input_grad(dy, weight), (dy.double() @ dense).float())


def test_shapes_that_do_not_belong_together_are_refused(weight: Int8Weight) -> None:
    with pytest.raises(ValueError, match="width 20"):
        int8.int8_linear(torch.zeros(4, 33), weight)
    with pytest.raises(ValueError, match="width 33"):
        int8.int8_input_grad(torch.zeros(4, 20), weight)
    with pytest.raises(ValueError, match="one per row"):
        Int8Weight(weight.codes, weight.scales[1:])
    with pytest.raises(ValueError, match="int8 matrix"):
        Int8Weight(weight.codes.float(), weight.scales)
