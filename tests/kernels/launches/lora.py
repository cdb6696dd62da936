"""Launches of batched LoRA: every group of Llama-3.1-8B, forward and backward."""

import itertools

import torch

from weft_kernels.lora import LoraBatch, LoraDropout, LoraEntry, LoraTable, fused

MODULES = (fused,)
HIDDEN, INTERMEDIATE, KV = 4096, 14336, 1024
GROUPS = (
    ((0, 1, 2), HIDDEN, (HIDDEN, KV, KV)),
    ((3,), HIDDEN, (HIDDEN,)),
    ((4, 5), HIDDEN, (INTERMEDIATE, INTERMEDIATE)),
    ((6,), INTERMEDIATE, (HIDDEN,)),
)


def launch(every: bool) -> None:
    """A decode batch of rank 16; with `every`, all tiles of ranks and rows, with and without dropout."""
    _launch(rank=16, num_rows=8, dropped=False)
    if every:
        for rank, num_rows, dropped in itertools.product((16, 32, 64, 256), (16, 32, 500), (False, True)):
            _launch(rank, num_rows, dropped)


def _launch(rank: int, num_rows: int, dropped: bool) -> None:
    entries, offset = [], 0
    for modules, width, outs in GROUPS:
        for module, out in zip(modules, outs, strict=True):
            entries.append(LoraEntry(0, module, rank, width, out, offset, offset + rank * width, 2.0))
            offset += rank * (width + out)
    table = LoraTable(torch.empty(offset, dtype=torch.bfloat16, device="meta"), 2, 2, 7)
    table.set_slot(0, 0, entries)
    batch = LoraBatch.build([(0, 0, num_rows)], "meta")
    assert batch is not None
    dropout = None
    if dropped:
        dropout = LoraDropout(
            torch.empty(num_rows, device="meta"), torch.empty(num_rows, dtype=torch.int64, device="meta")
        )
    for modules, width, outs in GROUPS:
        x = torch.empty(num_rows, width, dtype=torch.bfloat16, device="meta")
        y = torch.empty(num_rows, sum(outs), dtype=torch.bfloat16, device="meta")
        fused.lora_forward(x, y, table, 0, modules, outs, batch, dropout)
        grads = {0: torch.empty(offset, device="meta")}
        fused.lora_backward(x, y, x, grads, table, 0, modules, outs, batch, dropout)
