"""Launches of linear layers on packed weights: the linears of Llama-3.1-8B, in NF4 and int8."""

import torch

from weft_kernels.int8 import Int8Weight
from weft_kernels.int8 import fused as int8_fused
from weft_kernels.nf4 import Nf4Weight
from weft_kernels.nf4 import fused as nf4_fused
from weft_kernels.product import candidates, splits

MODULES = (nf4_fused, int8_fused, splits)
SHAPES = ((6144, 4096), (4096, 14336))
"""N, K of the fused query, key and value weight, and of the down projection."""

_SWIZZLE = "an operand whose rows are summed over is swizzled in units of 8 bytes"
_PAIRS = "an operand that a warp group takes from registers is swizzled in units of 8 bytes"
NARROW_LOADS = {
    "nf4_linear_kernel": {"packed = tl.load(": _PAIRS},
    "int8_linear_kernel": {"w_tile = tl.load(": _PAIRS},
    "nf4_input_grad_kernel": {"packed = tl.load(": _SWIZZLE},
    "int8_input_grad_kernel": {"w_tile = tl.load(": _SWIZZLE},
}
STACK_BYTES = {
    "nf4_linear_kernel": (8, "two registers of loop state, in some tiles of an A100"),
    "nf4_input_grad_kernel": (8, "two registers of loop state, with 32 rows on an H100"),
}


def launch(every: bool) -> None:
    """Nested scales and one row; with `every`, plain ones too and every plan that would be measured."""
    buckets = (1, 32, 64, 512) if every else (1,)
    for shape in SHAPES if every else SHAPES[:1]:
        weights = [_nf4(shape, nested) for nested in ((True, False) if every else (True,))]
        for weight in weights:
            nf4_fused.dequantize(weight, torch.bfloat16)
        codes = torch.empty(shape, dtype=torch.int8, device="meta")
        quantized = Int8Weight(codes, torch.empty(shape[0], device="meta"))
        for bucket in buckets:
            x, dy = (torch.empty(bucket, shape[i], dtype=torch.bfloat16, device="meta") for i in (1, 0))
            for plan in candidates("forward", bucket, shape):
                for weight in weights:
                    nf4_fused.nf4_linear(x, weight, None, plan)
                int8_fused.int8_linear(x, quantized, None, plan)
            for plan in candidates("input_grad", bucket, shape):
                for weight in weights:
                    nf4_fused.nf4_input_grad(dy, weight, plan)
                int8_fused.int8_input_grad(dy, quantized, plan)


def _nf4(shape: tuple[int, int], nested: bool) -> Nf4Weight:
    num_blocks = shape[0] * shape[1] // 64

    def meta(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    if nested:
        scales = {
            "absmax_codes": meta(num_blocks, torch.uint8),
            "nested_absmax": meta(num_blocks // 256),
            "nested_offset": meta(num_blocks // 256),
            "nested_map": meta(256),
        }
    else:
        scales = {"absmax": meta(num_blocks)}
    codes = meta(num_blocks * 32, torch.uint8)
    return Nf4Weight(codes, shape, torch.bfloat16, 64, meta(16), **scales)
