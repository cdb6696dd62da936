"""Drawing tokens: where every number lands is known from numpy's cumulative sums."""

from types import ModuleType

import numpy as np
import pytest
import torch

from weft_kernels.sampling import draw, fused, reference

PATHS = pytest.mark.parametrize("path", [reference, fused], ids=["reference", "fused"])


def numbers(count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@PATHS
@pytest.mark.parametrize("vocab_size", [1, 23, 2048, 5000])
def test_tokens_are_where_the_cumulative_distribution_passes_the_number(
    path: ModuleType, vocab_size: int, device: torch.device
) -> None:
    scores = torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    scores[:, 1::3] = -torch.inf
    uniforms = numbers(40)
    uniforms[0] = 0.0
    weights = np.exp(scores.double().numpy())
    cumulative = weights.cumsum(axis=1)
    targets = uniforms.numpy() * cumulative[:, -1]
    expected = [
        int(np.searchsorted(row, t, side="right")) for row, t in zip(cumulative, targets, strict=True)
    ]
    drawn = path.draw(scores.to(device), uniforms.to(device))
    assert drawn.tolist() == expected
    assert vocab_size == 1 or not scores[torch.arange(40), drawn.cpu()].isinf().any()


@PATHS
def test_a_number_below_one_never_passes_the_end(path: ModuleType, device: torch.device) -> None:
    scores = torch.full((3, 4099), -30.0)
    scores[:, 4098] = 0.0
    drawn = path.draw(scores.to(device), torch.full((3,), 1 - 2.0**-53, dtype=torch.float64, device=device))
    assert drawn.tolist() == [4098] * 3


@PATHS
def test_rows_that_are_not_finite_draw_some_token_that_exists(path: ModuleType, device: torch.device) -> None:
    scores = torch.full((2, 37), torch.nan)
    scores[1] = torch.inf
    drawn = path.draw(scores.to(device), numbers(2).to(device))
    assert ((drawn >= 0) & (drawn < 37)).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        draw(torch.zeros(2, 8), numbers(3))
    with pytest.raises(ValueError, match="expected float32 and float64"):
        draw(torch.zeros(2, 8).double(), numbers(2))


@pytest.mark.gpu
def test_the_kernel_draws_what_the_reference_draws() -> None:
    scores = torch.randn(64, 128256, device="cuda") * 4
    assert torch.equal(fused.draw(scores, numbers(64).cuda()), reference.draw(scores, numbers(64).cuda()))
