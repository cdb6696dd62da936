"""The loss head against torch's cross-entropy and autograd; the Triton kernel where it can run."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels.cross_entropy import fused, linear_cross_entropy, reference

PATHS = pytest.mark.parametrize("path", [reference, fused], ids=["reference", "fused"])
VOCAB = 301


def make(dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 32, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(VOCAB, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, (9,), generator=generator)
    labels[:4] = (x[:4] @ weight.T).argmax(-1)
    return x.to(dtype), weight.to(dtype), labels


def expected(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaf = x.double().requires_grad_()
    logits = F.linear(leaf, weight.double())
    loss = F.cross_entropy(logits, labels, reduction="none")
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), logits.argmax(-1) == labels, leaf.grad


@PATHS
@pytest.mark.parametrize("chunk_columns", [7, 64, VOCAB, 1000])
def test_loss_hits_and_gradient_are_torchs_whatever_the_chunk(
    path: ModuleType, chunk_columns: int, device: torch.device
) -> None:
    x, weight, labels = make()
    loss, correct, d_x = expected(x, weight, labels)
    ours = path.linear_cross_entropy(*(t.to(device) for t in (x, weight, labels)), chunk_columns)
    assert int(correct.sum()) >= 4
    assert not correct.all()
    assert torch.equal(ours.correct.cpu(), correct)
    torch.testing.assert_close(ours.loss.cpu(), loss.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.d_x.cpu(), d_x.float(), rtol=1e-4, atol=1e-5)


def test_float64_stays_float64() -> None:
    x, weight, labels = make(torch.float64)
    loss, _, d_x = expected(x, weight, labels)
    ours = linear_cross_entropy(x, weight, labels, chunk_columns=50)
    torch.testing.assert_close(ours.loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.d_x, d_x, rtol=1e-12, atol=1e-12)


@PATHS
def test_large_logits_neither_overflow_nor_vanish(path: ModuleType, device: torch.device) -> None:
    x, weight, labels = make(scale=300.0)
    loss, _, d_x = expected(x, weight, labels)
    ours = path.linear_cross_entropy(*(t.to(device) for t in (x, weight, labels)), 40)
    torch.testing.assert_close(ours.loss.cpu(), loss.float(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours.d_x.cpu(), d_x.float(), rtol=1e-3, atol=1e-3)


@PATHS
def test_of_equal_logits_the_first_is_the_most_likely(path: ModuleType, device: torch.device) -> None:
    x, weight = torch.ones(2, 4, device=device), torch.ones(100, 4, device=device)
    labels = torch.tensor([0, 99], device=device)
    assert path.linear_cross_entropy(x, weight, labels, 32).correct.tolist() == [True, False]


@PATHS
@pytest.mark.parametrize("token", [0, 150, 300])
def test_a_row_whose_logits_are_not_finite_has_no_finite_loss(
    path: ModuleType, token: int, device: torch.device
) -> None:
    x, weight, labels = make()
    weight[token] = torch.nan
    ours = path.linear_cross_entropy(*(t.to(device) for t in (x, weight, labels)), 64)
    assert ours.loss.isnan().all()
    assert ours.d_x.isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    x, weight, labels = make()
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(x[:, :8], weight, labels)
    with pytest.raises(ValueError, match="cannot mix"):
        linear_cross_entropy(x, weight.half(), labels)
    with pytest.raises(ValueError, match="must be positive"):
        linear_cross_entropy(x, weight, labels, chunk_columns=0)


@pytest.mark.gpu
def test_the_kernel_equals_the_reference_in_bfloat16() -> None:
    x = torch.randn(200, 4096, device="cuda").bfloat16()
    weight = (torch.randn(128256, 4096, device="cuda") / 32).bfloat16()
    labels = torch.randint(128256, (200,), device="cuda")
    ours, theirs = (path.linear_cross_entropy(x, weight, labels, 8192) for path in (fused, reference))
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-3, atol=1e-3)
    assert torch.equal(ours.correct, theirs.correct)
    torch.testing.assert_close(ours.d_x, theirs.d_x, rtol=0.05, atol=2e-3)
