"""The Triton kernel that draws tokens: unchecked device code; `fused.py` launches it."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def draw_kernel(scores, uniforms, tokens, V, BLOCK: tl.constexpr):
    """The first token at which `Σ exp(score - best)` exceeds `uniform` times the whole sum.

    A program owns one row and walks it three times, the last two in L2: for the best score, for the sum,
    for the place. Exponentials are float32, sums float64 in token order.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    scores += row * V
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    for first in range(0, V, BLOCK):
        z = tl.load(scores + first + c, mask=first + c < V, other=-float("inf"))
        best = tl.maximum(best, z)
    top = tl.max(best, axis=0)
    total = tl.full((), 0.0, tl.float64)
    for first in range(0, V, BLOCK):
        z = tl.load(scores + first + c, mask=first + c < V, other=-float("inf"))
        total += tl.sum(tl.exp(z - top).to(tl.float64), axis=0)
    target = tl.load(uniforms + row) * total
    before = tl.full((), 0.0, tl.float64)
    token = V - 1
    for first in range(0, V, BLOCK):
        z = tl.load(scores + first + c, mask=first + c < V, other=-float("inf"))
        p = tl.exp(z - top).to(tl.float64)
        after = before + tl.sum(p, axis=0)
        if (before <= target) & (after > target):
            num_passed = tl.sum((before + tl.cumsum(p, axis=0) <= target).to(tl.int32), axis=0)
            token = tl.minimum(first + tl.minimum(num_passed, BLOCK - 1), V - 1)
        before = after
    tl.store(tokens + row, token.to(tl.int64))
