"""NF4 linear layers in Triton: products that decode inside the tile, or decode-then-library, as planned.

Host side of the kernels in `kernels.py`. Same functions as `reference.py`, which defines them; arguments are
checked by the package's entry points. Runs on CUDA tensors, and on CPU tensors under Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft_kernels.nf4.kernels import (
    PIECE_BYTES,
    PIECES,
    nf4_dequantize_kernel,
    nf4_input_grad_kernel,
    nf4_linear_kernel,
)
from weft_kernels.nf4.weight import Nf4Weight
from weft_kernels.product import Plan, Tiles
from weft_kernels.product.splits import aligned, sum_splits, target

_STEP_BYTES = PIECE_BYTES * PIECES
_INPUT_GRAD_STEP = 64
_DEQUANTIZE_ELEMENTS = 4096
_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dequantize(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K]; see `weft_kernels.nf4.dequantize`."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    num_blocks_per_program = max(1, _DEQUANTIZE_ELEMENTS // weight.block_size)
    nf4_dequantize_kernel[(triton.cdiv(weight.num_blocks, num_blocks_per_program),)](
        out,
        weight.codes,
        *_scale_arguments(weight),
        *(weight.num_elements, weight.codes.numel(), weight.num_blocks),
        NESTED=weight.nested,
        SHUFFLED=_shuffles(weight),
        WEIGHT_DTYPE=_TRITON_DTYPES[weight.dtype],
        BLOCK_SIZE=weight.block_size,
        BLOCKS=num_blocks_per_program,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def nf4_linear(x: Tensor, weight: Nf4Weight, bias: Tensor | None, plan: Plan) -> Tensor:
    """`x Wᵀ + bias`: [T, N]; see `weft_kernels.nf4.nf4_linear`."""
    tiles = plan.tiles
    if tiles is None or not _has_whole_bytes(weight):
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
    num_rows, num_out, row_bytes = x.shape[0], weight.shape[0], weight.shape[1] // 2
    words = aligned(x).view(torch.int32 if x.dtype.itemsize == 2 else torch.int64)
    y = x.new_empty(num_rows, num_out)
    split_bytes = triton.cdiv(triton.cdiv(row_bytes, tiles.num_splits), _STEP_BYTES) * _STEP_BYTES
    num_splits = triton.cdiv(row_bytes, split_bytes)
    parts = target(y, num_splits)
    nf4_linear_kernel[(triton.cdiv(num_out, tiles.columns), triton.cdiv(num_rows, tiles.rows), num_splits)](
        *(words, parts, y if bias is None else bias),
        weight.codes,
        *_scale_arguments(weight),
        *(num_rows, num_out, row_bytes, split_bytes),
        HAS_BIAS=bias is not None and num_splits == 1,
        NESTED=weight.nested,
        SCALES="quad" if _has_quads(weight) else _scales_of_piece(weight),
        WHOLE=row_bytes % _STEP_BYTES == 0,
        SHUFFLED=_shuffles(weight),
        DTYPE=_TRITON_DTYPES[x.dtype],
        WEIGHT_DTYPE=_TRITON_DTYPES[weight.dtype],
        BLOCK_SIZE=weight.block_size,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns,
        num_warps=tiles.num_warps,
        num_stages=_num_stages(tiles, weight),
        enable_fp_fusion=False,
    )
    sum_splits(y, parts, bias)
    return y


def nf4_input_grad(dy: Tensor, weight: Nf4Weight, plan: Plan) -> Tensor:
    """`dy W`: [T, K]; see `weft_kernels.nf4.nf4_input_grad`. Tiles have 64 columns, whatever is planned."""
    tiles = plan.tiles
    if tiles is None or not _has_whole_bytes(weight):
        return dy @ dequantize(weight, dy.dtype)
    num_rows, (num_out, width) = dy.shape[0], weight.shape
    dx = dy.new_empty(num_rows, width)
    split_rows = triton.cdiv(triton.cdiv(num_out, tiles.num_splits), _INPUT_GRAD_STEP) * _INPUT_GRAD_STEP
    num_splits = triton.cdiv(num_out, split_rows)
    parts = target(dx, num_splits)
    nf4_input_grad_kernel[
        (triton.cdiv(width, 2 * PIECE_BYTES), triton.cdiv(num_rows, tiles.rows), num_splits)
    ](
        *(aligned(dy), parts),
        weight.codes,
        *_scale_arguments(weight),
        *(num_rows, num_out, width // 2, split_rows),
        NESTED=weight.nested,
        SCALES=_scales_of_piece(weight),
        SHUFFLED=_shuffles(weight),
        WEIGHT_DTYPE=_TRITON_DTYPES[weight.dtype],
        BLOCK_SIZE=weight.block_size,
        BLOCK_M=tiles.rows,
        BLOCK_N=_INPUT_GRAD_STEP,
        num_warps=tiles.num_warps,
        num_stages=_num_stages(tiles, weight),
        enable_fp_fusion=False,
    )
    sum_splits(dx, parts)
    return dx


def _num_stages(tiles: Tiles, weight: Nf4Weight) -> int:
    # A nested scale is loaded by way of its code, and the pipeline is as deep for each of the two loads.
    return 2 * tiles.num_stages - 1 if weight.nested else tiles.num_stages


def _has_whole_bytes(weight: Nf4Weight) -> bool:
    # A row of odd width begins in the middle of a byte.
    return weight.shape[1] % 2 == 0


def _scales_of_piece(weight: Nf4Weight) -> str:
    """ "row" where each piece of a row lies in one block, and nested codes fill words."""
    piece = 2 * PIECE_BYTES
    is_whole = weight.shape[1] % piece == 0 and weight.block_size % piece == 0
    return "row" if is_whole and (not weight.nested or weight.num_blocks % 4 == 0) else "byte"


def _has_quads(weight: Nf4Weight) -> bool:
    """Whether the four pieces of a step have one word of nested codes."""
    return weight.nested and weight.block_size == 2 * PIECE_BYTES and weight.shape[1] % (2 * _STEP_BYTES) == 0


def _shuffles(weight: Nf4Weight) -> bool:
    """Not in the interpreter, nor with values that are not NF4's."""
    return weight.device.type != "cpu" and weight.has_nf4_values


def _scale_arguments(weight: Nf4Weight) -> tuple[Tensor, ...]:
    """absmax, absmax_codes, nested_absmax, nested_offset, nested_map, quant_map; the last for absent ones."""
    absent = weight.quant_map
    scales = (
        weight.absmax,
        weight.absmax_codes,
        weight.nested_absmax,
        weight.nested_offset,
        weight.nested_map,
    )
    return (*(absent if tensor is None else tensor for tensor in scales), weight.quant_map)
