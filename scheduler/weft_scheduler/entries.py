"""What is known of one adapter: its state on the way to the device, who waits for it, who uses it, its place.

Values and small records alone; `residency` owns the transitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from weft_scheduler.plan import AdapterLoad, AdapterMove


class AdapterState(Enum):
    """How far an adapter has come."""

    ABSENT = "absent"
    FETCHING = "fetching"
    HOST = "host"
    LOADING = "loading"
    DEVICE = "device"


@dataclass(slots=True, eq=False)
class Entry:
    """One adapter that is wanted, used, or resident.

    `num_elements` is 0 until it is known; `staged_elements` is what it takes (or is guessed to take) in host
    memory on its way. `fence` is the last plan that could read it; `is_fresh` says that no one has used it
    since its load. A failed one is not fetched again before `retry_at_s` unless a request asks for it.
    """

    key: str
    num_elements: int
    is_training: bool
    state: AdapterState = AdapterState.ABSENT
    slot: int | None = None
    num_waiting: int = 0
    num_users: int = 0
    staged_elements: int = 0
    fence: int = 0
    is_fresh: bool = False
    is_pinned: bool = False
    pinned_since_s: float = 0.0
    retry_at_s: float = 0.0

    @property
    def is_wanted(self) -> bool:
        """Whether anybody waits for it, or it is to stay resident anyway."""
        return self.num_waiting > 0 or self.is_pinned


@dataclass(frozen=True, slots=True)
class AdapterActions:
    """What has to be done, in this order: clear table rows, move extents, start copies, start fetches."""

    evictions: tuple[tuple[str, int], ...]
    moves: tuple[AdapterMove, ...]
    loads: tuple[AdapterLoad, ...]
    fetches: tuple[str, ...]
