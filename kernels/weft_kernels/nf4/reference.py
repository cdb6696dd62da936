"""NF4 linear layers in plain PyTorch: the definition of the op, and the CPU path.

Decodes the matrix and calls the library's product. Arguments are checked by the package's entry points.
"""

import torch
from torch import Tensor

from weft_kernels.nf4.weight import Nf4Weight

_CHUNK_ELEMENTS = 1 << 22


def dequantize(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K]; see `weft_kernels.nf4.dequantize`. Temporaries are bounded, whatever the size."""
    absmax = weight.expanded_absmax()
    out = torch.empty(weight.num_elements, dtype=dtype, device=weight.device)
    code = torch.arange(256, device=weight.device)
    pairs = torch.stack((weight.quant_map[code >> 4], weight.quant_map[code & 15]), dim=1)
    blocks_per_chunk = max(1, _CHUNK_ELEMENTS // weight.block_size)
    for first in range(0, weight.num_blocks, blocks_per_chunk):
        scales = absmax[first : first + blocks_per_chunk]
        start = first * weight.block_size
        stop = min(start + scales.numel() * weight.block_size, weight.num_elements)
        values = pairs.index_select(0, weight.codes[start // 2 : (stop + 1) // 2].int()).view(-1)
        if values.numel() == scales.numel() * weight.block_size:
            values.view(-1, weight.block_size).mul_(scales[:, None])
        else:
            values.mul_(scales.repeat_interleave(weight.block_size)[: values.numel()])
        out[start:stop] = values[: stop - start].to(weight.dtype)
    return out.view(weight.shape)


def nf4_linear(x: Tensor, weight: Nf4Weight, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + bias`: [T, N]; see `weft_kernels.nf4.nf4_linear`."""
    return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)


def nf4_input_grad(dy: Tensor, weight: Nf4Weight) -> Tensor:
    """`dy W`: [T, K]; see `weft_kernels.nf4.nf4_input_grad`."""
    return dy @ dequantize(weight, dy.dtype)
