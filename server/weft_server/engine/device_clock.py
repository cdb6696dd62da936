"""How long an iteration takes on the device: the host's clock on a CPU, events in the stream on a GPU."""

from __future__ import annotations

import time

import torch


class DeviceClock:
    """Times one iteration, from its making to `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._events = (start, end)
            start.record()
        self._started = self._stopped = time.perf_counter()

    def stop(self) -> None:
        """Everything of the iteration has been issued (on a CPU: done)."""
        self._stopped = time.perf_counter()
        if self._events is not None:
            self._events[1].record()

    def wait(self) -> None:
        """Wait until the device has done it."""
        if self._events is not None:
            self._events[1].synchronize()

    def elapsed_s(self) -> float:
        """Seconds from the first operation to the last; on a GPU only after `wait`."""
        if self._events is None:
            return self._stopped - self._started
        return float(self._events[0].elapsed_time(self._events[1])) / 1000
