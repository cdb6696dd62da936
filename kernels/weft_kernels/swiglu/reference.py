"""SwiGLU in plain PyTorch: the definition of the op, and the CPU path.

Arguments are checked by the package's entry points; see there for shapes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) · up`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_backward(gate_up: Tensor, d_product: Tensor) -> Tensor:
    """`d_gate = d_product · up · silu'(gate)` and `d_up = d_product · silu(gate)`, side by side."""
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate_up = torch.empty_like(gate_up)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(d_product * up, gate, grad_input=d_gate)
    torch.mul(d_product, F.silu(gate), out=d_up)
    return d_gate_up
