"""The setting that admits bf16 units: on only within, and only where values are bf16; sums stay float32."""

import pytest
import torch

from weft_kernels.exact_products import bf16_valued


@pytest.fixture
def matmul() -> object:
    if not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"):
        pytest.skip("this PyTorch has no such setting")
    return torch.backends.mkldnn.matmul


def test_the_setting_is_restored_also_after_an_error(matmul: object) -> None:
    before = matmul.fp32_precision
    with bf16_valued(torch.bfloat16):
        assert matmul.fp32_precision == "bf16"
    assert matmul.fp32_precision == before
    with pytest.raises(ZeroDivisionError), bf16_valued(torch.bfloat16):
        raise ZeroDivisionError
    assert matmul.fp32_precision == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_values_of_other_dtypes_are_not_rounded(matmul: object, dtype: torch.dtype) -> None:
    before = matmul.fp32_precision
    with bf16_valued(dtype):
        assert matmul.fp32_precision == before


def test_sums_over_bf16_values_are_those_of_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(16, 4096, generator=generator).bfloat16()
    right = torch.randn(4096, 300, generator=generator).bfloat16()
    expected = left.double() @ right.double()
    with bf16_valued(torch.bfloat16):
        found = left.float() @ right.float()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-4)
