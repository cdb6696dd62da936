"""NF4 encoding: from a weight matrix to 4-bit codes with (doubly quantized) block scales.

Owns the encoder; the format itself and its decoding belong to `weft_kernels.nf4`. The format is QLoRA's
(arXiv:2305.14314) as bitsandbytes writes it on a CPU: codes, block scales, their offset, their 8-bit codes
and second-level scales are bit-identical to its `quantize_4bit`, so that a model quantized here is the same
model quantized there. (Encoding on a GPU may sum the mean of the scales, the offset, in another order.)

That includes a peculiarity of the 8-bit codes. bitsandbytes finds them in a table of 65,536 entries, which
amounts to rounding a scale to one of 65,536 levels before taking the nearest of the 256 values. So about
0.2 % of the codes stand for a neighbour of the nearest value, and the seven values within half a level of
zero are never used; what this adds to an error is at most one level, 3 · 10⁻⁵ of the group's largest centred
scale. Taking the nearest value itself would gain nothing measurable and give one model two encodings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels.nf4 import NESTED_BLOCK_SIZE, NF4_VALUES, Nf4Weight

_QUANTIZABLE = (torch.float32, torch.float16, torch.bfloat16)
_SMALLEST_SCALE = 1e-38
_CHUNK_ELEMENTS = 1 << 24
# Levels on [-1, 1], both ends included, to which a scale is rounded before its 8-bit code is chosen.
_NUM_SCALE_LEVELS = 1 << 16


def nf4_map(device: torch.device | None = None) -> Tensor:
    """The 16 values that NF4 codes stand for: [16] float32, ascending."""
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)


def dynamic_map(device: torch.device | None = None) -> Tensor:
    """The 256 values of the signed 8-bit dynamic-exponent type: [256] float32, ascending.

    Seven decades of both signs; the decade 10^e has 2^(e+6) linear steps, each represented by its middle;
    plus 0 and 1 (Dettmers et al., arXiv:1511.04561 and 2110.02861).
    """
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        positive.append((edges[:-1] + edges[1:]) / 2.0 * 10 ** (decade - 6))
    magnitudes = torch.cat(positive)
    values = torch.cat([-magnitudes, magnitudes, torch.tensor([0.0, 1.0])])
    return values.sort().values.to(device)


def quantize(weight: Tensor, *, block_size: int = 64, double: bool = True) -> Nf4Weight:
    """Encodes a matrix in NF4.

    Args:
        weight: [N, K] float32, float16 or bfloat16; its dtype is recorded, and decoding rounds to it first.
        block_size: consecutive elements (in row-major order) that share a scale; a power of two, 32 to 4096.
        double: quantize the scales too, to 8 bits in groups of 256, after subtracting their mean.

    Raises:
        ValueError: not a matrix, another dtype, a bad block size, or a value that is not finite.
    """
    if weight.ndim != 2 or weight.dtype not in _QUANTIZABLE:
        raise ValueError(f"NF4 encodes float16/bfloat16/float32 matrices, not {weight.dtype} {weight.shape}")
    if block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"block_size={block_size} is not a power of two from 32 to 4096")
    quant_map = nf4_map(weight.device)
    indices, absmax = _encode_blocks(weight.reshape(-1), quant_map, block_size)
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError("the weight holds values that are not finite")
    shape = (weight.shape[0], weight.shape[1])
    codes = _pack_nibbles(indices, zero_code=NF4_VALUES.index(0.0))
    if not double:
        return Nf4Weight(
            codes=codes,
            shape=shape,
            dtype=weight.dtype,
            block_size=block_size,
            quant_map=quant_map,
            absmax=absmax,
        )
    offset = absmax.mean()
    nested_map = dynamic_map(weight.device)
    absmax_codes, nested_absmax = encode_scales(absmax - offset, nested_map)
    return Nf4Weight(
        codes=codes,
        shape=shape,
        dtype=weight.dtype,
        block_size=block_size,
        quant_map=quant_map,
        absmax_codes=absmax_codes,
        nested_absmax=nested_absmax,
        nested_offset=offset.expand(nested_absmax.shape[0]).contiguous(),
        nested_map=nested_map,
    )


def encode_scales(centred: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes block scales to 8 bits in groups of 256, the last of which may be shorter.

    A group's scales are divided by its largest magnitude, rounded to the nearest of 65,536 levels and given
    the code of the value nearest to that level (the module docstring says why). Codes at a boundary between
    two levels depend on the order of the operations, which is therefore bitsandbytes', in float32.

    Args:
        centred: [num_blocks] float32, finite; the scales less their mean.
        values: [256] float32, ascending; what the codes stand for.

    Returns:
        The codes, [num_blocks] uint8, and each group's largest magnitude, [num_groups] float32.
    """
    num_blocks = centred.numel()
    groups = F.pad(centred, (0, -num_blocks % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    group_absmax = groups.abs().amax(dim=1)
    # A group of zeros has no reciprocal (0 · inf is NaN); its codes, which mean nothing, are 0.
    normalized = (groups * (1.0 / group_absmax)[:, None]).nan_to_num(nan=-1.0).clamp_(-1, 1)
    half = (_NUM_SCALE_LEVELS - 1) / 2
    levels = ((normalized + 1) * half + 0.5).floor_() / half - 1
    edges = (values[:-1] + values[1:]) / 2
    codes = torch.bucketize(levels.view(-1)[:num_blocks], edges, out_int32=True).to(torch.uint8)
    return codes, group_absmax


def _encode_blocks(flat: Tensor, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Indices of the nearest values (uint8, one per element) and the largest magnitude per block (fp32)."""
    edges = (values[:-1] + values[1:]) / 2
    num_full = flat.numel() - flat.numel() % block_size
    indices = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    scales = []
    for start in range(0, num_full, _CHUNK_ELEMENTS):
        stop = min(start + _CHUNK_ELEMENTS, num_full)
        blocks = flat[start:stop].float().view(-1, block_size)
        absmax = blocks.abs().amax(dim=1)
        normalized = (blocks * (1.0 / absmax.clamp(min=_SMALLEST_SCALE))[:, None]).clamp_(-1, 1)
        indices[start:stop] = torch.bucketize(normalized.view(-1), edges, out_int32=True)
        scales.append(absmax)
    if num_full < flat.numel():
        rest = flat[num_full:].float()
        absmax = rest.abs().amax().clamp(min=_SMALLEST_SCALE)
        indices[num_full:] = torch.bucketize((rest / absmax).clamp_(-1, 1), edges, out_int32=True)
        scales.append(absmax[None])
    return indices, torch.cat(scales)


def _pack_nibbles(indices: Tensor, zero_code: int) -> Tensor:
    """Two codes a byte, the even element in the high nibble; an odd last one is paired with a zero."""
    if indices.numel() % 2:
        indices = torch.cat([indices, indices.new_full((1,), zero_code)])
    return (indices[::2] << 4) | indices[1::2]
