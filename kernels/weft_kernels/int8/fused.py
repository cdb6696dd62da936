"""Int8 linear layers in Triton: products that decode inside the tile, or decode-then-library, as planned.

Host side of the kernels in `kernels.py`. Same functions as `reference.py`, which defines them; arguments are
checked by the package's entry points. Runs on CUDA tensors, and on CPU tensors under Triton's interpreter.
"""

import triton
from torch import Tensor

from weft_kernels.int8 import reference
from weft_kernels.int8.kernels import int8_input_grad_kernel, int8_linear_kernel
from weft_kernels.int8.weight import Int8Weight
from weft_kernels.product import Plan
from weft_kernels.product.splits import aligned, sum_splits, target

_STEP = 128
_INPUT_GRAD_STEP = 64


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None, plan: Plan) -> Tensor:
    """`x Wᵀ + bias`: [T, N]; see `weft_kernels.int8.int8_linear`."""
    tiles = plan.tiles
    if tiles is None:
        return reference.int8_linear(x, weight, bias)
    num_rows, (num_out, width) = x.shape[0], weight.shape
    y = x.new_empty(num_rows, num_out)
    split_columns = triton.cdiv(triton.cdiv(width, tiles.num_splits), _STEP) * _STEP
    num_splits = triton.cdiv(width, split_columns)
    parts = target(y, num_splits)
    int8_linear_kernel[(triton.cdiv(num_out, tiles.columns), triton.cdiv(num_rows, tiles.rows), num_splits)](
        *(aligned(x), parts, y if bias is None else bias, weight.codes, weight.scales),
        *(num_rows, num_out, width, split_columns),
        HAS_BIAS=bias is not None and num_splits == 1,
        WHOLE=width % _STEP == 0,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns,
        BLOCK_K=_STEP,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    sum_splits(y, parts, bias)
    return y


def int8_input_grad(dy: Tensor, weight: Int8Weight, plan: Plan) -> Tensor:
    """`dy W`: [T, K]; see `weft_kernels.int8.int8_input_grad`."""
    tiles = plan.tiles
    if tiles is None:
        return reference.int8_input_grad(dy, weight)
    num_rows, (num_out, width) = dy.shape[0], weight.shape
    dx = dy.new_empty(num_rows, width)
    split_rows = triton.cdiv(triton.cdiv(num_out, tiles.num_splits), _INPUT_GRAD_STEP) * _INPUT_GRAD_STEP
    num_splits = triton.cdiv(num_out, split_rows)
    parts = target(dx, num_splits)
    int8_input_grad_kernel[
        (triton.cdiv(width, tiles.columns), triton.cdiv(num_rows, tiles.rows), num_splits)
    ](
        *(aligned(dy), parts, weight.codes, weight.scales),
        *(num_rows, num_out, width, split_rows),
        BLOCK_M=tiles.rows,
        BLOCK_N=_INPUT_GRAD_STEP,
        BLOCK_K=tiles.columns,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    sum_splits(dx, parts)
    return dx
