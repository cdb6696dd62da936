"""The packed layout: where each LoRA tensor of one adapter lies in its flat vector.

A is `[rank, in]`, B is stored transposed, `[rank, out]`; every tensor starts at a multiple of `ALIGNMENT`
elements (128 bytes in bf16), and the A's of modules that share an input are neighbours. Knows offsets only:
not which device holds the vector, nor what the scale is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from weft_kernels.lora import ALIGNMENT
from weft_server.adapters.paths import MODULE_GROUPS, MODULES, ModuleShapes

__all__ = ["ALIGNMENT", "MAX_RANK", "MODULES", "AdapterLayout", "LayoutEntry", "ModuleShapes"]

MAX_RANK = 256


@dataclass(frozen=True, slots=True)
class LayoutEntry:
    """One adapted module. Offsets count elements from the start of the adapter's vector."""

    layer: int
    module: int
    rank: int
    in_features: int
    out_features: int
    a_offset: int
    b_offset: int

    @property
    def module_name(self) -> str:
        """Name of the module, e.g. `q_proj`."""
        return MODULES[self.module]

    @property
    def num_parameters(self) -> int:
        """Elements of A and B together, without padding."""
        return self.rank * (self.in_features + self.out_features)


@dataclass(frozen=True)
class AdapterLayout:
    """Offsets, ranks and shapes of all tensors of one adapter; absent modules take no space.

    Attributes:
        entries: ordered by layer, then module.
        num_elements: length of the flat vector, a multiple of `ALIGNMENT`.
        num_layers: decoder layers of the base, adapted or not.
    """

    entries: tuple[LayoutEntry, ...]
    num_elements: int
    num_layers: int
    _index: Mapping[tuple[int, int], LayoutEntry] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {(entry.layer, entry.module): entry for entry in self.entries})

    @staticmethod
    def build(num_layers: int, shapes: ModuleShapes, ranks: Mapping[tuple[int, str], int]) -> AdapterLayout:
        """Lay out an adapter with the given ranks.

        Within a layer and a group of modules that share an input, first all A's, then all B's.

        Args:
            num_layers: decoder layers of the base.
            shapes: module → (in_features, out_features).
            ranks: (layer, module name) → rank, for the adapted modules alone.

        Raises:
            ValueError: no module at all, a layer or module that the base lacks, or a rank outside 1 … 256.
        """
        _check(num_layers, shapes, ranks)
        offset = 0
        entries: list[LayoutEntry] = []
        for layer in range(num_layers):
            for group in MODULE_GROUPS:
                present = [module for module in group if (layer, module) in ranks]
                a_offsets: dict[str, int] = {}
                for module in present:
                    a_offsets[module] = offset
                    offset += _aligned(ranks[layer, module] * shapes[module][0])
                for module in present:
                    rank, (in_features, out_features) = ranks[layer, module], shapes[module]
                    module_idx = MODULES.index(module)
                    entries.append(
                        LayoutEntry(
                            layer, module_idx, rank, in_features, out_features, a_offsets[module], offset
                        )
                    )
                    offset += _aligned(rank * out_features)
        return AdapterLayout(tuple(entries), offset, num_layers)

    def __iter__(self) -> Iterator[LayoutEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def lookup(self, layer: int, module: str | int) -> LayoutEntry | None:
        """The entry of a module, given by name or index, or None if the adapter leaves it alone."""
        return self._index.get((layer, module if isinstance(module, int) else MODULES.index(module)))

    def a(self, flat: Tensor, layer: int, module: str | int) -> Tensor:
        """View of A `[rank, in]` in `flat` `[num_elements]`. Raises KeyError if absent."""
        entry = self._require(layer, module)
        size = entry.rank * entry.in_features
        return flat[entry.a_offset : entry.a_offset + size].view(entry.rank, entry.in_features)

    def b(self, flat: Tensor, layer: int, module: str | int) -> Tensor:
        """View of transposed B `[rank, out]` in `flat` `[num_elements]`. Raises KeyError if absent."""
        entry = self._require(layer, module)
        size = entry.rank * entry.out_features
        return flat[entry.b_offset : entry.b_offset + size].view(entry.rank, entry.out_features)

    @property
    def num_parameters(self) -> int:
        """Elements that belong to tensors: `num_elements` without padding."""
        return sum(entry.num_parameters for entry in self.entries)

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max(entry.rank for entry in self.entries)

    @property
    def module_names(self) -> tuple[str, ...]:
        """Names of the modules adapted in at least one layer, in the order of `MODULES`."""
        present = {entry.module for entry in self.entries}
        return tuple(name for module, name in enumerate(MODULES) if module in present)

    def _require(self, layer: int, module: str | int) -> LayoutEntry:
        entry = self.lookup(layer, module)
        if entry is None:
            raise KeyError(f"the adapter has no {module} in layer {layer}")
        return entry


def _aligned(num_elements: int) -> int:
    return -(-num_elements // ALIGNMENT) * ALIGNMENT


def _check(num_layers: int, shapes: ModuleShapes, ranks: Mapping[tuple[int, str], int]) -> None:
    if not ranks:
        raise ValueError("an adapter must adapt at least one module")
    for (layer, module), rank in ranks.items():
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer {layer} is outside the base's {num_layers} layers")
        if module not in shapes or module not in MODULES:
            raise ValueError(f"the base has no module {module!r}; it has {', '.join(shapes)}")
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"rank {rank} of {module} in layer {layer} is outside 1 … {MAX_RANK}")
