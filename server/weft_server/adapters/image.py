"""An adapter as the device arena takes it: the packed vector in the arena's dtype, pinned for a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft_kernels.lora import LoraEntry
from weft_server.adapters.errors import AdapterError
from weft_server.adapters.finite import all_finite
from weft_server.adapters.packed import PackedAdapter


@dataclass(frozen=True, slots=True, eq=False)
class HostImage:
    """What one contiguous copy brings to the arena.

    Attributes:
        digest: of the adapter that this is an image of.
        weights: CPU vector `[num_elements]` in the arena's dtype.
        entries: what the kernels' table needs to know, offsets relative to the extent.
    """

    digest: str
    weights: Tensor
    entries: tuple[LoraEntry, ...]

    @staticmethod
    def build(adapter: PackedAdapter, dtype: torch.dtype, *, pin_memory: bool = False) -> HostImage:
        """Cast an adapter to the arena's dtype.

        Raises:
            AdapterError: a weight does not fit the dtype's range.
        """
        weights = torch.empty(adapter.num_elements, dtype=dtype, pin_memory=pin_memory)
        weights.copy_(adapter.weights)
        if not all_finite(weights):
            raise AdapterError(
                f"a weight is beyond the range of {dtype}, in which this server computes; "
                f"the largest magnitude is {float(adapter.weights.abs().max()):.4g}"
            )
        return HostImage(adapter.digest, weights, table_entries(adapter))

    @property
    def num_elements(self) -> int:
        """Length of the vector: the size of the extent that it needs."""
        return self.weights.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that it takes, and of device memory that it will take."""
        return self.weights.nbytes


def table_entries(adapter: PackedAdapter) -> tuple[LoraEntry, ...]:
    """The rows of the kernels' table for an adapter."""
    return tuple(
        LoraEntry(
            layer=entry.layer,
            module=entry.module,
            rank=entry.rank,
            in_features=entry.in_features,
            out_features=entry.out_features,
            a_offset=entry.a_offset,
            b_offset=entry.b_offset,
            scale=adapter.scales[entry.layer, entry.module_name],
        )
        for entry in adapter.layout
    )
