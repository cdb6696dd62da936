"""Whether the engine loop still turns: when it began what it is doing, for another thread to look at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class LoopWatch:
    """One thread works, any other may ask for how long it has been at the present piece."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._busy_since_s: float | None = None

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Around each piece of work; waiting for work is outside."""
        self._busy_since_s = self._clock()
        try:
            yield
        finally:
            self._busy_since_s = None

    @property
    def busy_for_s(self) -> float:
        """Seconds since the present piece began; 0 between two."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else self._clock() - since_s
