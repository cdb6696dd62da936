"""Launches of RMSNorm: hidden sizes of Llama-3.1-8B and of the smaller benchmark models."""

import torch

from weft_kernels.norm import fused

MODULES = (fused,)


def launch(every: bool) -> None:
    """Width 4096; with `every`, 1024, 2048 and one that is no power of two."""
    for width in (4096, 1024, 2048, 5120) if every else (4096,):
        x = torch.empty(8, width, dtype=torch.bfloat16, device="meta")
        fused.add_rms_norm(x, x, x[0], 1e-5)
        fused.rms_norm_backward(x, x[0], x, 1e-5, x)
        fused.rms_norm_backward(x, x[0], x, 1e-5)
