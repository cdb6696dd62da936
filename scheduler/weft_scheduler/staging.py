"""How much waits in host memory on its way to the device. Counts elements; owns neither bytes nor states."""

from __future__ import annotations

from weft_scheduler.entries import Entry

REFILL_SHARE = 0.5
"""Once full, the host is filled again when no more than this share of it is taken, so that choosing what to
fetch, which looks at every missing adapter, is rare.
"""


class HostStaging:
    """Room for `capacity` elements of adapters that are fetched and not yet loaded; training adapters, whose
    image lies in host memory anyway, are not counted.
    """

    def __init__(self, capacity: int) -> None:
        """Start empty."""
        self.capacity = capacity
        self.num_elements = 0
        self._largest_known = 0
        self._is_full = False

    @property
    def is_open(self) -> bool:
        """Whether fetches are worth choosing now."""
        if self._is_full and self.num_elements <= self.capacity * REFILL_SHARE:
            self._is_full = False
        return not self._is_full

    def try_open_for(self, entry: Entry) -> bool:
        """Whether another fetch keeps within the room (one always may); if not, it is full until it has
        emptied.
        """
        fits = not self.num_elements or self.num_elements + self._size_or_guess(entry) <= self.capacity
        self._is_full = self._is_full or not fits
        return fits

    def add(self, entry: Entry) -> None:
        """An adapter is on its way, or its size has become known."""
        self.remove(entry)
        if not entry.is_training:
            self._largest_known = max(entry.num_elements, self._largest_known)
            entry.staged_elements = self._size_or_guess(entry)
            self.num_elements += entry.staged_elements

    def remove(self, entry: Entry) -> None:
        """An adapter is not (or no longer) on its way."""
        self.num_elements -= entry.staged_elements
        entry.staged_elements = 0

    def _size_or_guess(self, entry: Entry) -> int:
        """An adapter of unknown size is taken to be as large as the largest known one, at first an eighth."""
        return entry.num_elements or self._largest_known or max(self.capacity // 8, 1)
