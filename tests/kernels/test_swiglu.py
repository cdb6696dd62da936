"""SwiGLU against autograd; the Triton kernels where they can run."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels.swiglu import fused, reference, swiglu, swiglu_backward

PATHS = pytest.mark.parametrize("path", [reference, fused], ids=["reference", "fused"])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


@PATHS
@pytest.mark.parametrize("shape", [(1, 8), (5, 33), (3, 1500)])
def test_product_and_gradient_are_autograds(
    path: ModuleType, shape: tuple[int, int], device: torch.device
) -> None:
    gate_up, d_product = random(shape[0], 2 * shape[1], seed=1), random(*shape, seed=2)
    leaf = gate_up.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    product = F.silu(gate) * up
    product.backward(d_product.double())
    assert leaf.grad is not None
    out = path.swiglu(gate_up.to(device))
    torch.testing.assert_close(out.cpu(), product.float(), rtol=1e-5, atol=1e-5)
    d_gate_up = path.swiglu_backward(gate_up.to(device), d_product.to(device))
    torch.testing.assert_close(d_gate_up.cpu(), leaf.grad.float(), rtol=1e-5, atol=1e-5)


def test_the_reference_is_differentiable_by_autograd() -> None:
    gate_up = random(2, 12, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (gate_up,))


def test_matrices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one contiguous matrix"):
        swiglu(torch.zeros(3, 7))
    with pytest.raises(ValueError, match="does not fit"):
        swiglu_backward(torch.zeros(3, 8), torch.zeros(3, 8))


@pytest.mark.gpu
def test_kernels_equal_the_reference_in_bfloat16() -> None:
    gate_up, d = random(300, 28672, seed=1).bfloat16().cuda(), random(300, 14336, seed=2).bfloat16().cuda()
    torch.testing.assert_close(fused.swiglu(gate_up), reference.swiglu(gate_up), rtol=0.02, atol=0.02)
    ours, expected = (path.swiglu_backward(gate_up, d) for path in (fused, reference))
    torch.testing.assert_close(ours, expected, rtol=0.03, atol=0.1)
