"""The NF4 weight format: 4-bit codes, one scale per block, the scales themselves optionally quantized.

Owns the container and how weights join; decoding is in `reference.py` and `fused.py`, encoding elsewhere. The
format is QLoRA's (arXiv:2305.14314) as bitsandbytes stores it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""What the codes of an NF4 checkpoint stand for: quantiles of the standard normal distribution, scaled to
[-1, 1], with an exact zero (QLoRA, appendix E)."""

NESTED_BLOCK_SIZE = 256
"""Scales that share one second-level scale and offset."""


@dataclass(frozen=True, slots=True, eq=False)
class Nf4Weight:
    """A matrix [N, K] in NF4: `W[n, k] = quant_map[code] · absmax[(n·K + k) ÷ block_size]`, rounded to
    `dtype`.

    Attributes:
        codes: uint8 [ceil(N·K / 2)], row-major; the even element is the high nibble.
        shape: (N, K).
        dtype: the dtype the checkpoint records; decoding rounds to it before any other dtype.
        block_size: consecutive elements that share a scale; a power of two.
        quant_map: float32 [16].
        absmax: float32 [num_blocks], or None when the scales are quantized:
            `absmax[i] = nested_map[absmax_codes[i]] · nested_absmax[i ÷ 256] + nested_offset[i ÷ 256]`.
        absmax_codes: uint8 [num_blocks].
        nested_absmax, nested_offset: float32 [ceil(num_blocks / 256)].
        nested_map: float32 [256].
        has_nf4_values: whether the quant_map is `NF4_VALUES`, which kernels need not read then. Computed,
            which waits for the device: make weights while loading, not while serving.

    Raises:
        ValueError: sizes that contradict each other, or neither or both kinds of scales.
    """

    codes: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    block_size: int
    quant_map: Tensor
    absmax: Tensor | None = None
    absmax_codes: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_map: Tensor | None = None
    has_nf4_values: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size {self.block_size} is not a power of two")
        num_groups = -(-self.num_blocks // NESTED_BLOCK_SIZE)
        expected = {"codes": ((self.num_elements + 1) // 2, torch.uint8), "quant_map": (16, torch.float32)}
        if self.absmax is not None:
            expected["absmax"] = (self.num_blocks, torch.float32)
        else:
            expected["absmax_codes"] = (self.num_blocks, torch.uint8)
            expected["nested_absmax"] = expected["nested_offset"] = (num_groups, torch.float32)
            expected["nested_map"] = (256, torch.float32)
        for name in _TENSORS:
            tensor: Tensor | None = getattr(self, name)
            if name not in expected:
                if tensor is not None:
                    raise ValueError(f"{name} makes no sense beside absmax")
                continue
            size, dtype = expected[name]
            if tensor is None:
                raise ValueError(f"{name} is missing")
            if tensor.shape != (size,) or tensor.dtype != dtype or not tensor.is_contiguous():
                found = f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ValueError(f"{name} of a {self.shape} weight must be ({size},) {dtype}, got {found}")
        if not self.quant_map.is_meta:
            object.__setattr__(self, "has_nf4_values", tuple(self.quant_map.tolist()) == NF4_VALUES)

    @property
    def num_elements(self) -> int:
        """N·K."""
        return self.shape[0] * self.shape[1]

    @property
    def num_blocks(self) -> int:
        """Blocks that have a scale of their own; the last may be shorter."""
        return -(-self.num_elements // self.block_size)

    @property
    def nested(self) -> bool:
        """Whether the scales are quantized."""
        return self.absmax is None

    @property
    def device(self) -> torch.device:
        """Where all the tensors are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for name in _TENSORS if (t := getattr(self, name)) is not None)

    def to(self, device: torch.device | str) -> "Nf4Weight":
        """The same weight on another device."""
        present = {name: getattr(self, name) for name in _TENSORS}
        return replace(self, **{name: t.to(device) for name, t in present.items() if t is not None})

    def expanded_absmax(self) -> Tensor:
        """The block scales, float32 [num_blocks]; product and sum rounded separately, as in bitsandbytes."""
        if self.absmax is not None:
            return self.absmax
        assert self.absmax_codes is not None
        assert self.nested_absmax is not None
        assert self.nested_offset is not None
        assert self.nested_map is not None
        values = self.nested_map[self.absmax_codes.int()]
        values *= self.nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: self.num_blocks]
        return values.add_(self.nested_offset.repeat_interleave(NESTED_BLOCK_SIZE)[: self.num_blocks])


_TENSORS = tuple(
    entry.name
    for entry in fields(Nf4Weight)
    if entry.name not in ("shape", "dtype", "block_size", "has_nf4_values")
)


def can_concatenate(weights: Sequence[Nf4Weight]) -> bool:
    """Whether `concatenate` accepts these weights."""
    return _obstacle(weights) is None


def concatenate(weights: Sequence[Nf4Weight]) -> Nf4Weight:
    """Stack weights along N, e.g. q, k, v into one; decodes to exactly the stacked decoded weights.

    Quantized scales stay quantized where every part but the last fills whole groups of 256 scales and the
    maps agree; otherwise the scales of the result are float32.

    Raises:
        ValueError: no weights; different K, dtype, block size, code map or device; or a part other than the
            last that ends inside a block.
    """
    obstacle = _obstacle(weights)
    if obstacle is not None:
        raise ValueError(f"these weights cannot be concatenated, keep them separate: {obstacle}")
    first = weights[0]
    codes, shape = _cat(weights, "codes"), (sum(w.shape[0] for w in weights), first.shape[1])
    if _keeps_nesting(weights):
        return replace(
            first,
            codes=codes,
            shape=shape,
            absmax_codes=_cat(weights, "absmax_codes"),
            nested_absmax=_cat(weights, "nested_absmax"),
            nested_offset=_cat(weights, "nested_offset"),
        )
    absmax = torch.cat([w.expanded_absmax() for w in weights])
    return Nf4Weight(codes, shape, first.dtype, first.block_size, first.quant_map, absmax)


def _cat(weights: Sequence[Nf4Weight], name: str) -> Tensor:
    return torch.cat([getattr(w, name) for w in weights])


def _keeps_nesting(weights: Sequence[Nf4Weight]) -> bool:
    nested_map = weights[0].nested_map
    if nested_map is None:
        return False
    if any(w.nested_map is None or not torch.equal(w.nested_map, nested_map) for w in weights):
        return False
    return all(w.num_blocks % NESTED_BLOCK_SIZE == 0 for w in weights[:-1])


def _obstacle(weights: Sequence[Nf4Weight]) -> str | None:
    if not weights:
        return "there are none"
    first = weights[0]
    for w in weights[1:]:
        for name in ("dtype", "block_size", "device"):
            if getattr(w, name) != getattr(first, name):
                return f"{name} differs: {getattr(first, name)} and {getattr(w, name)}"
        if w.shape[1] != first.shape[1]:
            return f"input widths differ: {first.shape[1]} and {w.shape[1]}"
        if not torch.equal(w.quant_map, first.quant_map):
            return "their code maps differ"
    for w in weights[:-1]:
        if w.num_elements % w.block_size:
            return f"{w.num_elements} elements do not fill blocks of {w.block_size}"
    return None
