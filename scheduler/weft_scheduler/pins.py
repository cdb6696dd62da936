"""Adapters that are to stay on the device: which are asked for, and which of them there is a slot for.

Owns the set; where pinned adapters lie and what they displace is `residency`'s.
"""

from __future__ import annotations

from weft_scheduler.entries import AdapterState, Entry
from weft_scheduler.extents import aligned
from weft_scheduler.regions import Regions


class Pins:
    """Pins in the order in which they were asked for; the first ones are granted."""

    def __init__(self, regions: Regions) -> None:
        """Start without pins."""
        self.granted: dict[str, Entry] = {}
        self._regions = regions
        self._asked: dict[str, None] = {}

    def ask(self, key: str) -> None:
        """Pin an adapter, once there is a slot for it. Asking twice is asking once."""
        self._asked[key] = None

    def drop(self, key: str) -> Entry | None:
        """Forget a pin; returns its entry if it was granted."""
        self._asked.pop(key, None)
        entry = self.granted.pop(key, None)
        if entry is not None:
            entry.is_pinned = False
        return entry

    def next_to_grant(self) -> str | None:
        """The first pin that is not granted and finds a slot among those that pins may hold."""
        if len(self.granted) >= self._regions.max_pinned_slots:
            return None
        return next((key for key in self._asked if key not in self.granted), None)

    def grant(self, entry: Entry, now_s: float) -> None:
        """The adapter is to be brought near and to stay."""
        entry.is_pinned = True
        entry.pinned_since_s = entry.retry_at_s = now_s
        self.granted[entry.key] = entry

    def refusal(self, entry: Entry, num_elements: int) -> str | None:
        """Why a pinned adapter that nobody waits for is not worth its room in host memory."""
        if not entry.is_pinned or entry.num_waiting:
            return None
        most = self._regions.pinned_elements
        near = (AdapterState.HOST, AdapterState.LOADING, AdapterState.DEVICE)
        others = [other for other in self.granted.values() if other is not entry and other.state in near]
        held = sum(aligned(other.num_elements) for other in others)
        if held + aligned(num_elements) <= most:
            return None
        return (
            f"pinned adapter {entry.key} has {num_elements} elements; {len(others)} others hold {held} of "
            f"the {most} elements that may be pinned"
        )
