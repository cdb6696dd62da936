"""Where the adapters' LoRA weights live: one row of offsets, ranks and scales per `(slot, layer, module)`.

Owns the device tables that the Triton kernels address through and a host mirror of ready-made views for the
reference path. Knows no adapter names, no residency policy and no file format: a slot is a number whose
weights occupy one extent of a flat vector that somebody else allocates.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from weft_kernels.lora.stacks import StackCache
from weft_kernels.lora.widening import Widener
from weft_kernels.transfer import upload

ALIGNMENT = 64
"""Every extent and every tensor inside it starts at a multiple of this many elements."""


@dataclass(frozen=True, slots=True)
class LoraEntry:
    """One adapted linear layer of an adapter, as its layout describes it.

    `a_offset` and `b_offset` count elements from the start of the adapter's extent: A is `[rank,
    in_features]` there and B, transposed, `[rank, out_features]`. `scale` multiplies their product (alpha/r
    or alpha/sqrt(r)).
    """

    layer: int
    module: int
    rank: int
    in_features: int
    out_features: int
    a_offset: int
    b_offset: int
    scale: float


@dataclass(frozen=True, slots=True)
class SlotEntry:
    """Host views of one adapted layer: `a` [R, K], `b` [R, N] in the arena; offsets count from the extent."""

    a: Tensor
    b: Tensor
    scale: float
    rank: int
    a_offset: int
    b_offset: int


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """The adapted members of a fused group of modules that share one input.

    `members` holds `(index in the group, entry, rank_start, rank_end)`. `stacked_a` [sum of ranks, K] is one
    view over all members' A where the layout keeps them adjacent, so that one product serves the group; else
    None.
    """

    members: tuple[tuple[int, SlotEntry, int, int], ...]
    num_ranks: int
    in_features: int
    stacked_a: Tensor | None


class LoraTable:
    """Maps `(slot, layer, module)` to weights inside one flat arena.

    Args:
        weights: flat arena [E], any float dtype; kept by reference, never resized.
        num_slots, num_layers, num_modules: sizes of the table.

    Attributes:
        a_offsets, b_offsets: int64 [slots, L, M], element offsets into `weights`; 0 where absent.
        ranks: int32 [slots, L, M]; 0 means the module is not adapted.
        scales: float32 [slots, L, M].
        base: int64 [slots], element offset of each slot's extent.
        version: grows with every change.
        stacks: the CPU path's copies of weights that are multiplied together.
        widener: the CPU path's copies of rows in the dtype of gradients.

    Updates are copies on the current stream, hence ordered after every kernel already launched there. Not
    safe for concurrent use from several threads.
    """

    def __init__(self, weights: Tensor, num_slots: int, num_layers: int, num_modules: int) -> None:
        if weights.dim() != 1 or not weights.is_contiguous() or not weights.is_floating_point():
            raise ValueError(
                f"weights must be a flat contiguous float tensor, got {tuple(weights.shape)} {weights.dtype}"
            )
        if min(num_slots, num_layers, num_modules) < 1:
            raise ValueError(f"table sizes must be positive, got {(num_slots, num_layers, num_modules)}")
        self.weights = weights
        self.num_slots, self.num_layers, self.num_modules = num_slots, num_layers, num_modules
        shape, device = (num_slots, num_layers, num_modules), weights.device
        self.a_offsets = torch.zeros(shape, dtype=torch.int64, device=device)
        self.b_offsets = torch.zeros(shape, dtype=torch.int64, device=device)
        self.ranks = torch.zeros(shape, dtype=torch.int32, device=device)
        self.scales = torch.zeros(shape, dtype=torch.float32, device=device)
        self.base = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.version = 0
        self.stacks = StackCache()
        self.widener = Widener()
        self._slot_versions = [0] * num_slots
        self._bases = [0] * num_slots
        self._entries: list[dict[tuple[int, int], LoraEntry]] = [{} for _ in range(num_slots)]
        self._max_ranks = [0] * num_slots
        self._groups: list[dict[tuple[int, tuple[int, ...]], LoraGroup | None]] = [
            {} for _ in range(num_slots)
        ]

    def set_slot(self, slot: int, base: int, entries: Iterable[LoraEntry]) -> None:
        """Point `slot` at the extent that starts at element `base`, replacing whatever it pointed at.

        Raises:
            IndexError: slot, layer or module outside the table.
            ValueError: an offset that is not a multiple of 64 elements, a tensor reaching past the arena, a
                rank below 1, or two entries for one layer and module.
        """
        self._check_slot(slot)
        if base < 0 or base % ALIGNMENT:
            raise ValueError(f"base {base} is not a multiple of {ALIGNMENT} elements")
        by_site: dict[tuple[int, int], LoraEntry] = {}
        for entry in entries:
            self._check_entry(base, entry)
            if by_site.setdefault((entry.layer, entry.module), entry) is not entry:
                raise ValueError(f"two entries for layer {entry.layer}, module {entry.module}")
        self._bases[slot] = base
        self._entries[slot] = by_site
        self._max_ranks[slot] = max((entry.rank for entry in by_site.values()), default=0)
        self._groups[slot] = {}
        self.touch(slot)
        self._write_rows(slot)

    def rebase_slot(self, slot: int, base: int) -> None:
        """The extent of `slot` has moved to element `base`; what it adapts stays.

        Raises:
            IndexError, ValueError: as `set_slot`.
        """
        self._check_slot(slot)
        self.set_slot(slot, base, self._entries[slot].values())

    def clear_slot(self, slot: int) -> None:
        """Make `slot` adapt nothing. Raises IndexError for a slot outside the table."""
        self.set_slot(slot, 0, ())

    def touch(self, slot: int) -> None:
        """The weights of `slot` have been overwritten in place. Without it, copies of them are used on."""
        self.version += 1
        self._slot_versions[slot] = self.version

    def slot_version(self, slot: int) -> int:
        """Another number after every change of the slot or of its weights."""
        return self._slot_versions[slot]

    def entry(self, slot: int, layer: int, module: int) -> SlotEntry | None:
        """The views of one adapted layer, or None where `slot` does not adapt it."""
        group = self.group(slot, layer, (module,))
        return None if group is None else group.members[0][1]

    def group(self, slot: int, layer: int, modules: tuple[int, ...]) -> LoraGroup | None:
        """The views of the members of a fused group that `slot` adapts, or None if it adapts none of them.

        Views are made on first use and kept, unless the arena itself requires a gradient.
        """
        if self.weights.requires_grad:
            return self._build_group(slot, layer, modules)
        cache, key = self._groups[slot], (layer, modules)
        if key not in cache:
            cache[key] = self._build_group(slot, layer, modules)
        return cache[key]

    def max_rank(self, slot: int) -> int:
        """The largest rank of `slot` over all layers and modules; 0 for an empty slot."""
        return self._max_ranks[slot]

    def num_elements(self, slot: int) -> int:
        """Elements of all A and B of `slot`."""
        return sum(e.rank * (e.in_features + e.out_features) for e in self._entries[slot].values())

    def _build_group(self, slot: int, layer: int, modules: tuple[int, ...]) -> LoraGroup | None:
        entries, base = self._entries[slot], self._bases[slot]
        found = [(i, entries[layer, m]) for i, m in enumerate(modules) if (layer, m) in entries]
        if not found:
            return None
        members, num_ranks, adjacent = [], 0, True
        first = found[0][1]
        for i, e in found:
            adjacent = adjacent and e.a_offset == first.a_offset + num_ranks * e.in_features
            view = SlotEntry(
                a=self._matrix(base + e.a_offset, e.rank, e.in_features),
                b=self._matrix(base + e.b_offset, e.rank, e.out_features),
                scale=e.scale,
                rank=e.rank,
                a_offset=e.a_offset,
                b_offset=e.b_offset,
            )
            members.append((i, view, num_ranks, num_ranks + e.rank))
            num_ranks += e.rank
            if e.in_features != first.in_features:
                raise ValueError(
                    f"modules {modules} of layer {layer} in slot {slot} differ in their input width"
                )
        stacked = self._matrix(base + first.a_offset, num_ranks, first.in_features) if adjacent else None
        return LoraGroup(tuple(members), num_ranks, first.in_features, stacked)

    def _matrix(self, offset: int, rows: int, columns: int) -> Tensor:
        return self.weights.narrow(0, offset, rows * columns).view(rows, columns)

    def _write_rows(self, slot: int) -> None:
        num_sites = self.num_layers * self.num_modules
        a_row, b_row, ranks = [0] * num_sites, [0] * num_sites, [0] * num_sites
        scales = [0.0] * num_sites
        base = self._bases[slot]
        for (layer, module), e in self._entries[slot].items():
            site = layer * self.num_modules + module
            a_row[site], b_row[site] = base + e.a_offset, base + e.b_offset
            ranks[site], scales[site] = e.rank, e.scale
        shape = (self.num_layers, self.num_modules)
        device = self.weights.device
        self.a_offsets[slot].copy_(upload(a_row, torch.int64, device).view(shape))
        self.b_offsets[slot].copy_(upload(b_row, torch.int64, device).view(shape))
        self.ranks[slot].copy_(upload(ranks, torch.int32, device).view(shape))
        self.scales[slot].copy_(upload(scales, torch.float32, device).view(shape))
        self.base[slot].fill_(base)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} is outside the table of {self.num_slots} slots")

    def _check_entry(self, base: int, e: LoraEntry) -> None:
        where = f"layer {e.layer}, module {e.module}"
        if not (0 <= e.layer < self.num_layers and 0 <= e.module < self.num_modules):
            raise IndexError(
                f"{where} is outside the table of {self.num_layers} layers × {self.num_modules} modules"
            )
        if min(e.rank, e.in_features, e.out_features) < 1:
            raise ValueError(f"{where}: rank and widths must be positive, got {e}")
        for name, offset, width in (("A", e.a_offset, e.in_features), ("B", e.b_offset, e.out_features)):
            if offset < 0 or offset % ALIGNMENT:
                raise ValueError(
                    f"{where}: offset {offset} of {name} is not a multiple of {ALIGNMENT} elements"
                )
            if base + offset + e.rank * width > self.weights.numel():
                raise ValueError(f"{where}: {name} reaches past the arena of {self.weights.numel()} elements")
