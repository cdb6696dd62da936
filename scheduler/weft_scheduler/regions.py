"""How the adapter arena is divided between what jobs hold, what is pinned, and requests.

    0 ───────── requests rely on this ───────── │ pinned │ in training ── capacity

Requests may use all of it; jobs and pins only their own part, so that they cannot fragment what the largest
adapter of a request needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from weft_scheduler.entries import Entry
from weft_scheduler.extents import ALIGNMENT


@dataclass(frozen=True, slots=True)
class Regions:
    """The division of `capacity` elements and of the slots. Sizes are multiples of the alignment."""

    capacity: int
    training_elements: int
    pinned_elements: int
    max_training_slots: int
    max_pinned_slots: int

    @staticmethod
    def divide(capacity: int, num_slots: int, training_share: float, pinned_share: float) -> Regions:
        """Give jobs and pins their shares of elements and slots; at least one slot stays for requests."""
        num_training = int(num_slots * training_share) or int(training_share > 0.0)
        num_training = min(num_training, max(num_slots - 1, 0))
        num_pinned = int(num_slots * pinned_share) or int(pinned_share > 0.0)
        return Regions(
            capacity,
            int(capacity * training_share) // ALIGNMENT * ALIGNMENT,
            int(capacity * pinned_share) // ALIGNMENT * ALIGNMENT,
            num_training,
            min(num_pinned, max(num_slots - 1 - num_training, 0)),
        )

    @property
    def max_request_elements(self) -> int:
        """The largest adapter that can always be given room, whatever jobs hold and whatever is pinned."""
        return self.capacity - self.training_elements - self.pinned_elements

    @property
    def everywhere(self) -> tuple[int, int]:
        """The whole arena, `[start, end)`."""
        return 0, self.capacity

    @property
    def training(self) -> tuple[int, int]:
        """Where adapters in training lie, `[start, end)`."""
        return self.capacity - self.training_elements, self.capacity

    @property
    def pinned(self) -> tuple[int, int]:
        """Where pinned adapters belong, `[start, end)`."""
        return self.max_request_elements, self.capacity - self.training_elements

    def of(self, entry: Entry) -> tuple[int, int]:
        """Where an adapter belongs, `[start, end)`."""
        if entry.is_training:
            return self.training
        return self.pinned if entry.is_pinned and self.pinned_elements else self.everywhere
