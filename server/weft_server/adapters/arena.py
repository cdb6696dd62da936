"""The device arena: one preallocated buffer that holds every resident adapter, and the table that kernels
read it by.

Owns bytes and the table's rows. Which adapter goes to which slot and extent, and when, is the scheduler's
decision; the arena refuses one that would overwrite an extent in use. Not thread-safe: the engine loop alone
calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weft_kernels.lora import LoraTable
from weft_server.adapters.image import HostImage
from weft_server.adapters.layout import ALIGNMENT, MODULES

_MOVE_CHUNK_ELEMENTS = 1 << 22
"""Elements of the staging buffer through which extents are moved."""


@dataclass(frozen=True, slots=True)
class _Extent:
    start: int
    end: int


class LoadHandle:
    """A copy into the arena that may still be under way; its slot stays empty until `finish`."""

    def __init__(self, landed: torch.cuda.Event | None, complete: Callable[[], None]) -> None:
        self._landed = landed
        self._complete: Callable[[], None] | None = complete

    def ready(self) -> bool:
        """True when the bytes have landed. Never blocks."""
        return self._landed is None or _has_passed(self._landed)

    def finish(self) -> None:
        """Enter the adapter in the table; kernels launched on the current stream from now on see it.

        Does not block the host: should the copy still be under way, the current stream waits for it.

        Raises:
            RuntimeError: called twice.
        """
        if self._complete is None:
            raise RuntimeError("the load is already finished")
        complete, self._complete = self._complete, None
        complete()


class AdapterArena:
    """Adapter weights on the device.

    Args:
        num_elements: capacity; rounded down to a multiple of 64 elements.
        num_slots: adapters that can be resident at a time.
        num_layers: decoder layers of the base.
        dtype: of the weights.
        device: where they live.

    Attributes:
        weights: the flat buffer, zero at first.
        table: what `weft_kernels.lora` reads; only this class changes it.
    """

    def __init__(
        self, num_elements: int, num_slots: int, num_layers: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        capacity = num_elements // ALIGNMENT * ALIGNMENT
        self.weights: Tensor = torch.zeros(capacity, dtype=dtype, device=device)
        self.table = LoraTable(self.weights, num_slots, num_layers, len(MODULES))
        self._extents: dict[int, _Extent] = {}
        self._loading: set[int] = set()
        self._copying: list[tuple[HostImage, torch.cuda.Event]] = []
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._copies.wait_stream(torch.cuda.current_stream(device))

    @property
    def num_elements(self) -> int:
        """Capacity in elements."""
        return self.weights.numel()

    def load(self, slot: int, offset: int, image: HostImage) -> None:
        """Copy an image to `[offset, offset + num_elements)` and enter it at `slot`; ordered on the current
        stream.

        Raises:
            ValueError: the slot is taken, or the extent is misaligned, overlaps another or leaves the arena.
        """
        self.load_async(slot, offset, image).finish()

    def load_async(self, slot: int, offset: int, image: HostImage) -> LoadHandle:
        """Start the copy on a side stream (on a CPU it is done at once); nothing reads it before `finish`.

        The caller guarantees that no kernel in flight still reads the extent.

        Raises:
            ValueError: as `load`, or the image has another dtype than the arena.
        """
        if image.weights.dtype != self.weights.dtype:
            raise ValueError(f"the image is {image.weights.dtype}, the arena {self.weights.dtype}")
        extent = self._reserve(slot, offset, image.num_elements)
        target = self.weights[extent.start : extent.end]
        self._loading.add(slot)
        landed: torch.cuda.Event | None = None
        if self._copies is None:
            target.copy_(image.weights)
        else:
            landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._copies):
                target.copy_(image.weights, non_blocking=True)
                landed.record(self._copies)
        return LoadHandle(landed, lambda: self._complete(slot, image, landed))

    def move(self, slot: int, destination: int) -> None:
        """Copy the extent of `slot` to `destination`, which may overlap it, and point the table there.

        Ordered on the current stream: kernels already launched have read the old place, later ones read the
        new one; loads that begin later wait for the copy, as they may be given the old place.

        Raises:
            ValueError: the slot is empty or loading, or the new place is misaligned, overlaps another extent
                or leaves the arena; nothing has changed.
        """
        source = self._loaded(slot)
        del self._extents[slot]
        try:
            target = self._reserve(slot, destination, source.end - source.start)
        except ValueError:
            self._extents[slot] = source
            raise
        _copy_within(self.weights, source, target)
        self.table.rebase_slot(slot, target.start)
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self.weights.device))

    def clear(self, slot: int) -> None:
        """Take the adapter at `slot` out of the table; its extent may be loaded again.

        Raises:
            ValueError: the slot is empty or its load is not finished.
        """
        if slot in self._loading:
            raise ValueError(f"slot {slot} is still loading; finish the load first")
        if self._extents.pop(slot, None) is None:
            raise ValueError(f"slot {slot} is empty")
        self.table.clear_slot(slot)

    def write(self, slot: int, flat: Tensor) -> None:
        """Overwrite the weights at `slot` from a vector of the same layout, casting (a training master, say).

        Ordered on the current stream: kernels launched later read the new weights.

        Raises:
            ValueError: the slot is empty or loading, or the vector has another length.
        """
        extent = self._loaded(slot)
        if flat.shape != (extent.end - extent.start,):
            raise ValueError(
                f"slot {slot} has {extent.end - extent.start} elements, got shape {tuple(flat.shape)}"
            )
        self.weights[extent.start : extent.end].copy_(flat, non_blocking=flat.is_cuda)
        self.table.touch(slot)

    def view(self, slot: int) -> Tensor:
        """The weights at `slot` as a view `[num_elements]`. Raises ValueError if it is empty or loading."""
        extent = self._loaded(slot)
        return self.weights[extent.start : extent.end]

    def _loaded(self, slot: int) -> _Extent:
        extent = self._extents.get(slot)
        if extent is None or slot in self._loading:
            raise ValueError(f"slot {slot} holds no loaded adapter")
        return extent

    def _complete(self, slot: int, image: HostImage, landed: torch.cuda.Event | None) -> None:
        if landed is not None:
            torch.cuda.current_stream(self.weights.device).wait_event(landed)
            # Pinned memory must outlive the copy that reads it.
            self._copying = [(held, event) for held, event in self._copying if not _has_passed(event)]
            self._copying.append((image, landed))
        self._loading.remove(slot)
        self.table.set_slot(slot, self._extents[slot].start, image.entries)

    def _reserve(self, slot: int, offset: int, num_elements: int) -> _Extent:
        if not 0 <= slot < self.table.num_slots:
            raise ValueError(f"slot {slot} is outside the arena's {self.table.num_slots} slots")
        if slot in self._extents:
            raise ValueError(f"slot {slot} is taken; clear it first")
        if offset % ALIGNMENT or offset < 0 or offset + num_elements > self.num_elements:
            raise ValueError(
                f"extent [{offset}, {offset + num_elements}) is not aligned to {ALIGNMENT} elements "
                f"within the arena's {self.num_elements}"
            )
        extent = _Extent(offset, offset + num_elements)
        for other, taken in self._extents.items():
            if taken.start < extent.end and extent.start < taken.end:
                raise ValueError(f"extent [{extent.start}, {extent.end}) overlaps the one of slot {other}")
        self._extents[slot] = extent
        return extent


def _copy_within(weights: Tensor, source: _Extent, target: _Extent) -> None:
    """Copy an extent to where it may overlap itself: in chunks through a staging buffer, each read before the
    chunks behind it are written."""
    shift = target.start - source.start
    starts = range(source.start, source.end, _MOVE_CHUNK_ELEMENTS)
    for start in starts if shift < 0 else reversed(starts):
        end = min(start + _MOVE_CHUNK_ELEMENTS, source.end)
        weights[start + shift : end + shift].copy_(weights[start:end].clone())


def _has_passed(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]
