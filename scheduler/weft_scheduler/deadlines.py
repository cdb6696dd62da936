"""Which sequences have run out of time, in the order of their deadlines."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from weft_scheduler.requests import Sequence

_SLACK = 64


class Deadlines:
    """Sequences that have a deadline. Those that end before it are forgotten by and by."""

    def __init__(self) -> None:
        """Start empty."""
        self._heap: list[tuple[float, int, Sequence]] = []
        self._most = _SLACK

    def __len__(self) -> int:
        """Entries kept, of ended sequences too."""
        return len(self._heap)

    def add(self, sequence: Sequence) -> None:
        """Watch a sequence, unless it has no deadline. Its order must be unique."""
        if sequence.spec.deadline_s is None:
            return
        heappush(self._heap, (sequence.spec.deadline_s, sequence.order, sequence))
        if len(self._heap) > self._most:
            self._heap = [entry for entry in self._heap if not entry[2].is_finished]
            heapify(self._heap)
            self._most = 2 * len(self._heap) + _SLACK

    def take_expired(self, now_s: float) -> list[Sequence]:
        """The unfinished sequences whose deadline is `now_s` or before; they are watched no longer."""
        expired = []
        while self._heap and self._heap[0][0] <= now_s:
            sequence = heappop(self._heap)[2]
            if not sequence.is_finished:
                expired.append(sequence)
        return expired
