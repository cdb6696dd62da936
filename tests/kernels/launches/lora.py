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


_SCRATCH = "a few ranks wide, from L2, straight into the layout that the tensor cores want"
NARROW_LOADS = {
    "weight_grad_kernel": {
        "total = tl.load(rows + columns": _SCRATCH,
        "total += tl.load(rows + split": _SCRATCH,
    }
}


def launch(every: bool) -> None:
    """Decode batches of rank 16; with `every`, all tiles of ranks and rows, with and without dropout."""
    _launch(rank=16, num_rows=1, num_slots=32)
    if every:
        for rank, num_rows, dropped in itertools.product((16, 32, 64, 256), (16, 32, 500), (False, True)):
            _launch(rank, num_rows, dropped=dropped)


def _launch(rank: int, num_rows: int, *, num_slots: int = 1, dropped: bool = False) -> None:
    """Batches of `num_slots` adapters of this rank with `num_rows` rows each."""
    entries, offset = [], 0
    for modules, width, outs in GROUPS:
        for module, out in zip(modules, outs, strict=True):
            entries.append(LoraEntry(0, module, rank, width, out, offset, offset + rank * width, 2.0))
            offset += rank * (width + out)
    table = LoraTable(torch.empty(offset, dtype=torch.bfloat16, device="meta"), num_slots, 1, 7)
    for slot in range(num_slots):
        table.set_slot(slot, 0, entries)
    batch = LoraBatch.build([(slot, slot * num_rows, num_rows) for slot in range(num_slots)], "meta")
    assert batch is not None
    dropout, total = None, batch.num_rows
    if dropped:
        keys = torch.empty(total, dtype=torch.int64, device="meta")
        dropout = LoraDropout(torch.empty(total, device="meta"), keys)
    for modules, width, outs in GROUPS:
        x = torch.empty(total, width, dtype=torch.bfloat16, device="meta")
        y = torch.empty(total, sum(outs), dtype=torch.bfloat16, device="meta")
        fused.lora_forward(x, y, table, 0, modules, outs, batch, dropout)
        grads = {0: torch.empty(offset, device="meta")}
        fused.lora_backward(x, y, x, grads, table, 0, modules, outs, batch, dropout)
