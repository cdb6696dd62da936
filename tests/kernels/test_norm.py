"""RMSNorm against autograd and torch's own norm; the Triton kernels where they can run."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels.norm import add_rms_norm, fused, reference, rms_norm, rms_norm_backward

EPS = 1e-5
PATHS = pytest.mark.parametrize("path", [reference, fused], ids=["reference", "fused"])
SHAPES = pytest.mark.parametrize("shape", [(1, 64), (5, 96), (3, 1000), (2, 4096)])


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@PATHS
@SHAPES
def test_the_norm_of_a_sum_is_torchs(path: ModuleType, shape: tuple[int, int], device: torch.device) -> None:
    x, residual = random(*shape, seed=1).to(device), random(*shape, seed=2).to(device)
    weight = random(shape[1], seed=3).to(device)
    total = x.clone()
    y = path.add_rms_norm(total, residual, weight, EPS)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, F.rms_norm(x + residual, shape[1:], weight, EPS))
    torch.testing.assert_close(rms_norm(x + residual, weight, EPS), y)


@PATHS
@SHAPES
@pytest.mark.parametrize("has_residual", [False, True])
def test_the_backward_is_autograds(
    path: ModuleType, shape: tuple[int, int], has_residual: bool, device: torch.device
) -> None:
    x, d_y, weight = random(*shape, seed=1), random(*shape, seed=2), random(shape[1], seed=3)
    d_residual = random(*shape, seed=4) if has_residual else None
    wide = x.double().requires_grad_()
    F.rms_norm(wide, shape[1:], weight.double(), EPS).backward(d_y.double())
    assert wide.grad is not None
    expected = wide.grad if d_residual is None else wide.grad + d_residual
    on_device = [None if t is None else t.to(device) for t in (x, weight, d_y, d_residual)]
    d_x = path.rms_norm_backward(*on_device[:3], EPS, on_device[3])
    torch.testing.assert_close(d_x.cpu(), expected.float(), rtol=1e-4, atol=1e-5)


def test_float64_stays_float64() -> None:
    x, d_y, weight = (random(*s, seed=1, dtype=torch.float64) for s in ((4, 32), (4, 32), (32,)))
    leaf = x.clone().requires_grad_()
    F.rms_norm(leaf, (32,), weight, EPS).backward(d_y)
    torch.testing.assert_close(rms_norm_backward(x, weight, d_y, EPS), leaf.grad, rtol=1e-12, atol=1e-12)


@PATHS
def test_rows_of_a_wider_matrix_are_read_where_they_are(path: ModuleType, device: torch.device) -> None:
    wide = random(4, 160, seed=1).to(device)
    weight = random(64, seed=2).to(device)
    d_x = path.rms_norm_backward(wide[:, :64], weight, wide[:, 64:128], EPS, wide[:, 96:])
    separate = [part.contiguous() for part in (wide[:, :64], wide[:, 64:128], wide[:, 96:])]
    expected = reference.rms_norm_backward(separate[0], weight, separate[1], EPS, separate[2])
    torch.testing.assert_close(d_x, expected)


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        add_rms_norm(torch.zeros(2, 8), torch.zeros(2, 4), torch.ones(8), EPS)
    with pytest.raises(ValueError, match="must be contiguous"):
        add_rms_norm(torch.zeros(8, 2).T, torch.zeros(2, 8), torch.ones(8), EPS)


@pytest.mark.gpu
def test_kernels_equal_the_reference_in_bfloat16() -> None:
    x, other = (random(300, 4096, seed=s).bfloat16().cuda() for s in (1, 2))
    weight = random(4096, seed=3).bfloat16().cuda()
    totals = x.clone(), x.clone()
    ys = [p.add_rms_norm(t, other, weight, EPS) for p, t in zip((reference, fused), totals, strict=True)]
    assert torch.equal(*totals)
    torch.testing.assert_close(*ys, rtol=0.02, atol=0.02)
    grads = [p.rms_norm_backward(x, weight, other, EPS, x) for p in (reference, fused)]
    torch.testing.assert_close(*grads, rtol=0.02, atol=0.02)
