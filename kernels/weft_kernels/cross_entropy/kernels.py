"""The Triton kernel of the loss head: unchecked device code; `fused.py` launches it."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["start"])
def softmax_chunk_kernel(
    logits,
    logits_stride,
    labels,
    best,
    best_idx,
    total,
    label_logit,
    rescale,
    start,
    num_columns,
    BLOCK: tl.constexpr,
):
    """One chunk of an online softmax: `logits` becomes `exp(logits - best)`.

    A program owns a row of the chunk, whose columns are tokens from `start` on, and walks it twice: for its
    largest logit, then for the exponentials. It brings the row's `best` logit and where it is, the `total` of
    exponentials and the logit of the label up to date; what was summed before counts `rescale` times. The
    first chunk (`start` 0) finds nothing. float32.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits + row * logits_stride
    c = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    top_at = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, num_columns, BLOCK):
        z = tl.load(logits_row + first + c, mask=first + c < num_columns, other=-float("inf")).to(tl.float32)
        top_at = tl.where(z > top, first + c, top_at)
        top = tl.where(z > top, z, top)
    chunk_best = tl.max(top, axis=0)
    chunk_at = tl.min(tl.where(top == chunk_best, top_at, num_columns), axis=0)
    label = tl.load(labels + row) - start
    if (label >= 0) & (label < num_columns):
        tl.store(label_logit + row, tl.load(logits_row + label).to(tl.float32))
    previous = tl.load(best + row, mask=start > 0, other=-float("inf"))
    factor = tl.where(start > 0, tl.exp(previous - tl.maximum(previous, chunk_best)), 0.0)
    if (start == 0) | (chunk_best > previous):
        tl.store(best_idx + row, (start + chunk_at).to(tl.int64))
    now = tl.maximum(previous, chunk_best)
    sums = tl.zeros((BLOCK,), tl.float32)
    tl.debug_barrier()
    for first in range(0, num_columns, BLOCK):
        mask = first + c < num_columns
        z = tl.load(logits_row + first + c, mask=mask, other=-float("inf")).to(tl.float32)
        p = tl.exp(z - now)
        sums += tl.where(mask, p, 0.0)
        tl.store(logits_row + first + c, p.to(logits.dtype.element_ty), mask=mask)
    before = tl.load(total + row, mask=start > 0, other=0.0)
    tl.store(best + row, now)
    tl.store(rescale + row, factor)
    tl.store(total + row, before * factor + tl.sum(sums, axis=0))
