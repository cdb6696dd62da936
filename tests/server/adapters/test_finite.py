"""`all_finite` says what `isfinite().all()` says."""

from __future__ import annotations

import pytest
import torch

from weft_server.adapters.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 64, 1001, 40_003])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, size: int) -> None:
    values = torch.linspace(-1, 1, size).to(dtype)
    assert all_finite(values)
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place in {0, size // 2, size - 1}:
            spoiled = values.clone()
            spoiled[place] = bad
            assert not all_finite(spoiled)
            assert not bool(spoiled.isfinite().all())
        assert not all_finite(torch.full((size,), bad, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    assert all_finite(torch.full((4096,), torch.finfo(dtype).max, dtype=dtype))
    assert all_finite(torch.full((64, 64), torch.finfo(dtype).min, dtype=dtype).t()[::2])
