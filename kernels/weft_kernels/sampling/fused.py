"""Drawing tokens in Triton, for CUDA tensors and, under Triton's interpreter, CPU tensors.

Same function as `reference.py`, which defines it; arguments are checked by the package's entry point.
"""

import torch
from torch import Tensor

from weft_kernels.sampling.kernels import draw_kernel

_BLOCK = 2048


def draw(scores: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the row's uniform number."""
    num_rows, vocab_size = scores.shape
    tokens = torch.empty((num_rows,), dtype=torch.int64, device=scores.device)
    draw_kernel[(num_rows,)](
        scores, uniforms, tokens, vocab_size, BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=True
    )
    return tokens
