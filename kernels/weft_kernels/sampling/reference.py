"""Drawing tokens in plain PyTorch: the definition of the op, and the CPU path.

Arguments are checked by the package's entry point; see there for shapes.
"""

import torch
from torch import Tensor


def draw(scores: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the row's uniform number."""
    cumulative = torch.softmax(scores, dim=-1).double().cumsum(dim=-1)
    target = uniforms.unsqueeze(1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return drawn.clamp_(max=scores.shape[-1] - 1)
