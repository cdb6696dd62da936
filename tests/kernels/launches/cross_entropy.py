"""Launches of the loss head: the vocabulary of Llama-3.1-8B."""

import torch

from weft_kernels.cross_entropy import fused

MODULES = (fused,)


def launch(every: bool) -> None:
    """Whole chunks and the one at the end; with `every`, a vocabulary whose rows are not aligned."""
    x = torch.empty(256, 4096, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta")
    labels = torch.empty(256, dtype=torch.int64, device="meta")
    fused.linear_cross_entropy(x, weight, labels, 8192)
