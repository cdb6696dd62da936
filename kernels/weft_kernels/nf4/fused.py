"""NF4 linear layers in Triton: products that decode inside the tile for few rows, decode-then-GEMM for many.

Host side of the kernels in `kernels.py`. Same functions as `reference.py`, which defines them; arguments are
checked by the package's entry points. Runs on CUDA tensors, and on CPU tensors under Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft_kernels.nf4.kernels import dequantize_kernel, input_grad_kernel, linear_kernel
from weft_kernels.nf4.weight import MAX_FUSED_ROWS, Nf4Weight

TILE_COLUMNS = 64
_DEQUANTIZE_ELEMENTS = 4096
_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dequantize(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K]; see `weft_kernels.nf4.dequantize`."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    num_blocks_per_program = max(1, _DEQUANTIZE_ELEMENTS // weight.block_size)
    dequantize_kernel[(triton.cdiv(weight.num_blocks, num_blocks_per_program),)](
        out,
        weight.codes,
        *_scale_arguments(weight),
        *(weight.num_elements, weight.codes.numel(), weight.num_blocks),
        NESTED=weight.nested,
        WEIGHT_DTYPE=_TRITON_DTYPES[weight.dtype],
        BLOCK_SIZE=weight.block_size,
        BLOCKS=num_blocks_per_program,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def nf4_linear(x: Tensor, weight: Nf4Weight, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + bias`: [T, N]; see `weft_kernels.nf4.nf4_linear`."""
    if not _decodes_in_tile(x, weight):
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
    (num_rows, width), num_out = x.shape, weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(num_rows, num_out)
    block_m = _rows_per_tile(num_rows)
    linear_kernel[(triton.cdiv(num_out, TILE_COLUMNS), triton.cdiv(num_rows, block_m))](
        *(x, x.stride(0), y, y.stride(0), y if bias is None else bias),
        weight.codes,
        *_scale_arguments(weight),
        *(num_rows, num_out, width, width // 2),
        HAS_BIAS=bias is not None,
        NESTED=weight.nested,
        WHOLE_BLOCKS=_has_whole_blocks(weight),
        WEIGHT_DTYPE=_TRITON_DTYPES[weight.dtype],
        CACHED=weight.device.type != "cpu",
        BLOCK_SIZE=weight.block_size,
        BLOCK_M=block_m,
        BLOCK_N=TILE_COLUMNS,
        BLOCK_K=TILE_COLUMNS,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    return y


def nf4_input_grad(dy: Tensor, weight: Nf4Weight) -> Tensor:
    """`dy W`: [T, K]; see `weft_kernels.nf4.nf4_input_grad`."""
    if not _decodes_in_tile(dy, weight):
        return dy @ dequantize(weight, dy.dtype)
    num_rows, (num_out, width) = dy.shape[0], weight.shape
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    dx = dy.new_empty(num_rows, width)
    block_m = _rows_per_tile(num_rows)
    input_grad_kernel[(triton.cdiv(width, TILE_COLUMNS), triton.cdiv(num_rows, block_m))](
        *(dy, dy.stride(0), dx, dx.stride(0)),
        weight.codes,
        *_scale_arguments(weight),
        *(num_rows, num_out, width, width // 2),
        NESTED=weight.nested,
        WHOLE_BLOCKS=_has_whole_blocks(weight),
        WEIGHT_DTYPE=_TRITON_DTYPES[weight.dtype],
        CACHED=weight.device.type != "cpu",
        BLOCK_SIZE=weight.block_size,
        BLOCK_M=block_m,
        BLOCK_N=TILE_COLUMNS,
        BLOCK_K=TILE_COLUMNS,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    return dx


def _decodes_in_tile(x: Tensor, weight: Nf4Weight) -> bool:
    # A row of odd width begins in the middle of a byte.
    return 0 < x.shape[0] <= MAX_FUSED_ROWS and weight.shape[1] % 2 == 0


def _has_whole_blocks(weight: Nf4Weight) -> bool:
    return weight.shape[1] % TILE_COLUMNS == 0 and weight.block_size % TILE_COLUMNS == 0


def _rows_per_tile(num_rows: int) -> int:
    return 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64


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
