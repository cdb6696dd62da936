"""Int8 weights: decoding and products against plain arithmetic in float64."""

import pytest
import torch

from weft_kernels import int8
from weft_kernels.int8 import Int8Weight
from weft_kernels.product import Plan, Tiles, candidates, row_bucket


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "tiles"),
    [(1, Tiles(16, 64, 1, 2, 3)), (19, Tiles(16, 32, 3, 1, 3)), (70, Tiles(64, 128, 2, 8, 3)), (3, None)],
)
@pytest.mark.parametrize("shape", [(70, 512), (33, 67), (129, 384)])
def test_fused_products_equal_plain_arithmetic(
    device: torch.device, shape: tuple[int, int], num_rows: int, tiles: Tiles | None, dtype: torch.dtype
) -> None:
    from weft_kernels.int8 import fused

    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
    weight = Int8Weight(codes, torch.rand(shape[0], generator=generator) / 127).to(device)
    x = torch.randn(num_rows, shape[1], generator=generator).to(device, dtype)
    dy = torch.randn(num_rows, shape[0], generator=generator).to(device, dtype)
    bias = torch.randn(shape[0], generator=generator).to(device, dtype)
    dense = weight.codes.double() * weight.scales.double()[:, None]
    for actual, expected in (
        (fused.int8_linear(x, weight, bias, Plan(tiles)), x.double() @ dense.T + bias),
        (fused.int8_linear(x, weight, None, Plan(tiles)), x.double() @ dense.T),
        (fused.int8_input_grad(dy, weight, Plan(tiles)), dy.double() @ dense),
    ):
        assert actual.dtype == dtype
        tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 5, 16, 30, 64, 500])
def test_fused_equals_plain_arithmetic_in_bfloat16_at_model_shapes(num_rows: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    shape = (6144, 4096)
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")
    weight = Int8Weight(codes, torch.rand(shape[0], device="cuda") / 127)
    dense = weight.codes * weight.scales[:, None]
    x = torch.randn(num_rows, shape[1], device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(num_rows, shape[0], device="cuda", dtype=torch.bfloat16)
    bucket = row_bucket(num_rows)
    assert bucket is not None
    for direction, product, rows, expected in (
        ("forward", int8.int8_linear, x, x.float() @ dense.T),
        ("input_grad", int8.int8_input_grad, dy, dy.float() @ dense),
    ):
        tolerance = 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
        for plan in candidates(direction, bucket, shape):
            actual = product(rows, weight, plan=plan)
            torch.testing.assert_close(actual.float(), expected, rtol=0, atol=tolerance)
            assert torch.equal(product(rows, weight, plan=plan), actual)
