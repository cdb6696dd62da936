"""Launches of the NF4 linear: the fused query, key and value weight of Llama-3.1-8B."""

import itertools

import torch

from weft_kernels.nf4 import Nf4Weight, fused

MODULES = (fused,)
N, K = 6144, 4096

_LOOKUP = "a gather from the 16 entries of the quantization map, which stay in L1"
NARROW_LOADS = {
    "dequantize_kernel": {"value = tl.load(address)": _LOOKUP},
    "linear_kernel": {"value = tl.inline_asm_elementwise(": _LOOKUP},
    "input_grad_kernel": {"value = tl.inline_asm_elementwise(": _LOOKUP},
}
STACK_BYTES = {"input_grad_kernel": (16, "four registers, with 32 rows on sm_90")}


def launch(every: bool) -> None:
    """Nested scales and a tile of 16 rows; with `every`, plain ones too and all tiles of rows."""
    _launch(nested=True, num_rows=16)
    if every:
        for nested, num_rows in itertools.product((False, True), (1, 32, 64)):
            _launch(nested, num_rows)


def _launch(nested: bool, num_rows: int) -> None:
    num_blocks = N * K // 64

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
    weight = Nf4Weight(meta(N * K // 2, torch.uint8), (N, K), torch.bfloat16, 64, meta(16), **scales)
    fused.dequantize(weight, torch.bfloat16)
    fused.nf4_linear(torch.empty(num_rows, K, dtype=torch.bfloat16, device="meta"), weight)
    fused.nf4_input_grad(torch.empty(num_rows, N, dtype=torch.bfloat16, device="meta"), weight)
