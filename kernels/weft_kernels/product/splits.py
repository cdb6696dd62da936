"""Inputs and outputs of planned products, and sums over their splits.

Programs that share a sum write partial sums, a second kernel adds them: in order and without atomics, so that
a result depends on its inputs alone.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 1024


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def sum_splits_kernel(
    out, parts, bias, num_rows, width, num_splits, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """`out[e] = Σ_s parts[s, e] + bias[e mod width]`; a program owns BLOCK elements, float32 sums."""
    num_elements = num_rows.to(tl.int64) * width
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < num_elements
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(num_splits):
        total += tl.load(parts + split * num_elements + element, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + element % width, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + element, total.to(out.dtype.element_ty), mask=mask)


def aligned(rows: Tensor) -> Tensor:
    """The rows, contiguous and 16-byte aligned, so that every launch is one that was compiled before."""
    if rows.is_contiguous() and rows.storage_offset() * rows.itemsize % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def target(out: Tensor, num_splits: int) -> Tensor:
    """Where the programs of a product write: `out` itself, or float32 [num_splits, *out.shape]."""
    return out if num_splits == 1 else out.new_empty(num_splits, *out.shape, dtype=torch.float32)


def sum_splits(out: Tensor, parts: Tensor, bias: Tensor | None = None) -> None:
    """`out = Σ_s parts[s] + bias`, summed in float32 in the order of s; nothing to do where they are one.

    Args:
        out: [T, width], contiguous.
        parts: what `target` gave for it.
        bias: [width] or None.
    """
    if parts is out:
        return
    sum_splits_kernel[(triton.cdiv(out.numel(), _ELEMENTS),)](
        *(out, parts, out if bias is None else bias, *out.shape, parts.shape[0]),
        HAS_BIAS=bias is not None,
        BLOCK=_ELEMENTS,
        num_warps=4,
    )
