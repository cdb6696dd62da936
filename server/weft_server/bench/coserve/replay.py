"""A window's requests in real time: who has arrived by now, and when each token came.

Knows no engine. The contender asks between two iterations, as a server's loop does, so a request that arrives
during an iteration waits for its end, and that wait is part of its time to first token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from weft_server.bench.coserve.window import Answer, Window
from weft_server.bench.coserve.workload import BenchRequest


class Replay:
    """The requests of one window, by the clock."""

    def __init__(
        self, requests: Sequence[BenchRequest], window: Window, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`requests` in order of arrival; times count from `window.start_s` on."""
        self._requests = requests
        self._window = window
        self._clock = clock
        self._next = 0
        self._times: dict[str, list[float]] = {}
        self._num_open = 0
        self._expected = {request.request_id: request.num_output_tokens for request in requests}

    @property
    def now_s(self) -> float:
        """Seconds since the window began; negative before."""
        return self._clock() - self._window.start_s

    def take_due(self) -> list[BenchRequest]:
        """The requests that have arrived since the last call."""
        due, now_s = [], self.now_s
        while self._next < len(self._requests) and self._requests[self._next].arrival_s <= now_s:
            due.append(self._requests[self._next])
            self._next += 1
        self._times.update((request.request_id, []) for request in due)
        self._num_open += len(due)
        return due

    def token(self, request_id: str) -> bool:
        """A token of a request exists from now on; returns whether it was the last."""
        times = self._times[request_id]
        times.append(self.now_s)
        is_last = len(times) == self._expected[request_id]
        self._num_open -= is_last
        return is_last

    def wait_s(self, most_s: float) -> float:
        """Seconds until something is due, `most_s` at most, 0 if it is already."""
        now_s = self.now_s
        until_s = self._requests[self._next].arrival_s if self._next < len(self._requests) else now_s + most_s
        return min(most_s, max(0.0, until_s - now_s))

    @property
    def is_over(self) -> bool:
        """Whether the window has ended and its requests are answered, or there is no more time for them."""
        now_s, window = self.now_s, self._window
        if now_s < window.seconds:
            return False
        is_answered = self._next == len(self._requests) and not self._num_open
        return is_answered or now_s >= window.seconds + window.drain_s

    @property
    def open_ids(self) -> list[str]:
        """Requests that have arrived and are unanswered."""
        return [name for name, times in self._times.items() if len(times) < self._expected[name]]

    def answers(self) -> tuple[Answer, ...]:
        """What became of every request of the window."""
        return tuple(
            Answer(
                request.arrival_s,
                len(request.prompt),
                request.num_output_tokens,
                tuple(self._times.get(request.request_id, ())),
            )
            for request in self._requests
        )
