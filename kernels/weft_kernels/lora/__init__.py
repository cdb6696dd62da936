"""Batched LoRA: the low-rank updates of any number of adapters added to one flat token batch.

Checks arguments and chooses between the Triton kernels (CUDA tensors) and the reference (everything else;
float64 always). `weft_kernels.lora.reference` and `weft_kernels.lora.fused` hold the two, with the same
signatures.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from weft_kernels.lora import reference
from weft_kernels.lora.batch import LoraBatch
from weft_kernels.lora.buffer import LoraBuffer
from weft_kernels.lora.dropout import LoraDropout, dropout_mask
from weft_kernels.lora.table import ALIGNMENT, LoraEntry, LoraGroup, LoraTable, SlotEntry

__all__ = [
    "ALIGNMENT",
    "LoraBatch",
    "LoraBuffer",
    "LoraDropout",
    "LoraEntry",
    "LoraGroup",
    "LoraTable",
    "SlotEntry",
    "dropout_mask",
    "lora_backward",
    "lora_forward",
]


def lora_forward(
    x: Tensor,
    y: Tensor,
    table: LoraTable,
    layer: int,
    modules: Sequence[int],
    widths: Sequence[int],
    batch: LoraBatch,
    dropout: LoraDropout | None = None,
) -> None:
    """Add every adapter's update to the output of a (fused group of) linear layer(s), in place.

    For each row of the batch and each module m: `y[:, columns of m] += s_m (drop_m(x) A_mᵀ) B_m`.

    Args:
        x: input [T, K], shared by the modules.
        y: output [T, sum(widths)], updated in place; the columns of the modules stand side by side.
        table: where the weights live.
        layer: layer index.
        modules: indices of the modules in the group, e.g. (0, 1, 2) for q, k, v.
        widths: the output width N of each module.
        batch: which rows use which slot; all other rows are left alone.
        dropout: masks on `x` per module; None for none.

    Differentiable by autograd where the reference runs (CPU, or float64).

    Raises:
        ValueError: shapes or devices that do not belong together.
    """
    modules = tuple(modules)
    _check(x, y, table, layer, modules, widths, batch, dropout)
    if _use_kernels(x, table):
        from weft_kernels.lora import fused

        fused.lora_forward(x, y, table, layer, modules, widths, batch, dropout)
    else:
        reference.lora_forward(x, y, table, layer, modules, widths, batch, dropout)


def lora_backward(
    x: Tensor,
    dy: Tensor,
    dx: Tensor,
    grads: Mapping[int, Tensor],
    table: LoraTable,
    layer: int,
    modules: Sequence[int],
    widths: Sequence[int],
    batch: LoraBatch,
    dropout: LoraDropout | None = None,
) -> None:
    """Accumulate the gradients of `lora_forward`, in place and without atomics.

    With `u = s (dy Bᵀ)` and `v = drop(x) Aᵀ`: `dx += mask·(u A)`, `dA += uᵀ drop(x)`, `dB += s vᵀ dy`.

    Args:
        x: input of the forward pass [T, K].
        dy: cotangent of the output [T, sum(widths)].
        dx: cotangent of the input [T, K], added to.
        grads: flat gradient per slot, laid out like the adapter's extent (offset 0 is its first element),
            float32 or wider; added to. A slot that is absent is frozen and contributes to `dx` only.
        table, layer, modules, widths, batch, dropout: as in the forward pass.

    Raises:
        ValueError: shapes or devices that do not belong together.
    """
    modules = tuple(modules)
    _check(x, dy, table, layer, modules, widths, batch, dropout)
    if dx.shape != x.shape or dx.device != x.device:
        raise ValueError(f"dx {tuple(dx.shape)} must match x {tuple(x.shape)} on {x.device}")
    for slot, grad in grads.items():
        if grad.dim() != 1 or not grad.is_contiguous() or grad.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"gradient of slot {slot} must be flat, contiguous and float32 or float64")
    if _use_kernels(x, table):
        from weft_kernels.lora import fused

        fused.lora_backward(x, dy, dx, grads, table, layer, modules, widths, batch, dropout)
    else:
        reference.lora_backward(x, dy, dx, grads, table, layer, modules, widths, batch, dropout)


def _use_kernels(x: Tensor, table: LoraTable) -> bool:
    return x.is_cuda and torch.float64 not in (x.dtype, table.weights.dtype)


def _check(
    x: Tensor,
    y: Tensor,
    table: LoraTable,
    layer: int,
    modules: tuple[int, ...],
    widths: Sequence[int],
    batch: LoraBatch,
    dropout: LoraDropout | None,
) -> None:
    if x.dim() != 2 or y.dim() != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must be matrices with one row per token")
    if len(modules) != len(widths) or sum(widths) != y.shape[1]:
        raise ValueError(f"widths {tuple(widths)} of modules {modules} do not make up {y.shape[1]} columns")
    if not 0 <= layer < table.num_layers or not all(0 <= m < table.num_modules for m in modules):
        raise ValueError(f"layer {layer} or modules {modules} are outside the table")
    if batch.max_row >= x.shape[0] or batch.segments[-1][0] >= table.num_slots:
        raise ValueError(
            f"the batch names row {batch.max_row} or slot {batch.segments[-1][0]}, which do not exist"
        )
    if not x.device == y.device == table.weights.device == batch.token_idx.device:
        raise ValueError("x, y, the arena and the batch must be on one device")
    if dropout is not None and not (dropout.p.shape == dropout.keys.shape == (x.shape[0],)):
        raise ValueError(f"dropout needs one p and one key per row of x, got {tuple(dropout.p.shape)}")
