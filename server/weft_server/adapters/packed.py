"""One adapter in host memory: its packed vector, layout, scales and digest.

Owns the meaning of the digest: it covers every tensor in its original precision and every scale, rank and
target, and nothing else, so that it depends neither on packing nor on metadata that does not change outputs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weft_server.adapters.config import LoraConfig
from weft_server.adapters.errors import AdapterError
from weft_server.adapters.finite import all_finite
from weft_server.adapters.layout import MODULES, AdapterLayout, LayoutEntry, ModuleShapes

_DIGEST_FORMAT = b"weft-adapter-1"


@dataclass(frozen=True, slots=True, eq=False)
class PackedAdapter:
    """An adapter in the packed layout.

    Attributes:
        layout: offsets, ranks and shapes.
        weights: CPU vector `[layout.num_elements]` of any float dtype, unscaled; padding is zero.
        scales: (layer, module name) → factor of B A x, for exactly the layout's entries.
        config: the hyperparameters it was made with.
        digest: `sha256:<hex>` over the original tensors; kept by `to`.
    """

    layout: AdapterLayout
    weights: Tensor
    scales: Mapping[tuple[int, str], float]
    config: LoraConfig
    digest: str

    def to(self, dtype: torch.dtype) -> PackedAdapter:
        """The same adapter with its weights cast; the digest still names the original."""
        return self if self.weights.dtype == dtype else replace(self, weights=self.weights.to(dtype))

    @property
    def num_elements(self) -> int:
        """Length of the packed vector: what it takes of an arena."""
        return self.layout.num_elements

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, without padding."""
        return self.layout.num_parameters

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return self.layout.max_rank

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Names of the modules adapted in at least one layer."""
        return self.layout.module_names


class AdapterDigest:
    """Accumulates an adapter's digest from its tensors in PEFT's orientation, in any order."""

    def __init__(self) -> None:
        self._records: dict[tuple[int, int], bytes] = {}

    def add(self, entry: LayoutEntry, scale: float, lora_a: Tensor, lora_b: Tensor) -> None:
        """Cover one module: contiguous CPU tensors A `[R, K]` and B `[N, R]` in their original dtype."""
        shape = f"{entry.rank}/{entry.in_features}/{entry.out_features}"
        head = f"{entry.layer}/{entry.module_name}/{shape}/{float(scale).hex()}"
        parts = [head, *(f"{_dtype_name(t)}:{_tensor_hash(t)}" for t in (lora_a, lora_b))]
        self._records[entry.layer, entry.module] = "|".join(parts).encode()

    def value(self) -> str:
        """`sha256:<hex>` of everything added so far."""
        digest = hashlib.sha256(_DIGEST_FORMAT)
        for key in sorted(self._records):
            digest.update(b"\n" + self._records[key])
        return f"sha256:{digest.hexdigest()}"


def pack(
    layout: AdapterLayout,
    scales: Mapping[tuple[int, str], float],
    tensors: Mapping[tuple[int, str], tuple[Tensor, Tensor]],
    config: LoraConfig,
) -> PackedAdapter:
    """Pack tensors in PEFT's orientation: A `[R, K]` and B `[N, R]` per (layer, module) of the layout.

    The vector has the narrowest dtype that holds every tensor exactly.
    """
    dtypes = {tensor.dtype for pair in tensors.values() for tensor in pair}
    dtype = dtypes.pop()
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    weights = torch.zeros(layout.num_elements, dtype=dtype)
    digest = AdapterDigest()
    for entry in layout:
        key = (entry.layer, entry.module_name)
        lora_a, lora_b = tensors[key]
        layout.a(weights, entry.layer, entry.module).copy_(lora_a)
        layout.b(weights, entry.layer, entry.module).copy_(lora_b.t())
        digest.add(entry, scales[key], lora_a, lora_b)
    return PackedAdapter(layout, weights, dict(scales), config, digest.value())


def repack(adapter: PackedAdapter, weights: Tensor) -> PackedAdapter:
    """The same layout and scales with other weights (a trained master, say) and the digest that belongs to
    them.

    Args:
        weights: vector `[num_elements]` on any device; copied to the host. Padding need not be zero.

    Raises:
        ValueError: the vector's length is not the layout's.
        AdapterError: a NaN or Inf, with layer and module named.
    """
    if weights.shape != (adapter.num_elements,):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}, the layout {adapter.num_elements} elements"
        )
    host = weights.detach().cpu()
    tensors: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for entry in adapter.layout:
        lora_a = adapter.layout.a(host, entry.layer, entry.module)
        lora_b = adapter.layout.b(host, entry.layer, entry.module)
        if not (all_finite(lora_a) and all_finite(lora_b)):
            raise AdapterError(
                f"the weights of {entry.module_name} in layer {entry.layer} contain NaN or Inf"
            )
        tensors[entry.layer, entry.module_name] = (lora_a, lora_b.t().contiguous())
    return pack(adapter.layout, adapter.scales, tensors, adapter.config)


def new_adapter(
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: tuple[str, ...],
    use_rslora: bool,
    num_layers: int,
    shapes: ModuleShapes,
    seed: int,
) -> PackedAdapter:
    """A fresh fp32 adapter, initialised as PEFT does: A uniform in ±1/√in (Kaiming, a=√5), B zero.

    Args:
        target_modules: Weft's module names; every one must exist in the base.
        seed: equal seeds give equal adapters.

    Raises:
        AdapterError: a module that the base lacks, none at all, or a rank or dropout out of range.
    """
    for module in target_modules:
        if module not in shapes:
            raise AdapterError(
                f"target_modules names {module!r}, which this base model does not have; "
                f"choose among {', '.join(m for m in MODULES if m in shapes)}",
                param="target_modules",
            )
    config = LoraConfig(
        rank=rank, alpha=alpha, use_rslora=use_rslora, dropout=dropout, target_modules=target_modules
    )
    resolved = config.resolve(num_layers, shapes)
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    tensors: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for key, module_config in resolved.items():
        in_features, out_features = shapes[key[1]]
        uniform = torch.rand(module_config.rank, in_features, generator=generator)
        lora_a = (2.0 * uniform - 1.0) / math.sqrt(in_features)
        tensors[key] = (lora_a, torch.zeros(out_features, module_config.rank))
    layout = AdapterLayout.build(num_layers, shapes, {key: module.rank for key, module in resolved.items()})
    return pack(layout, {key: module.scale for key, module in resolved.items()}, tensors, config)


def _tensor_hash(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
