"""Latencies and outcome of one choice, measured where its tokens arrive and reported to the metrics once."""

from __future__ import annotations

from collections.abc import Callable

from weft_server.metrics import Metrics


class ChoiceTimer:
    """Latencies and outcome of one choice, reported once."""

    def __init__(self, metrics: Metrics, tenant: str, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._tenant = tenant
        self._clock = clock
        self._start = clock()
        self._first: float | None = None
        self._last = self._start
        self._num_tokens = 0
        self._ended = False

    def tokens(self, num_tokens: int) -> None:
        """Count the tokens of one delta, perhaps none."""
        if not num_tokens:
            return
        now = self._clock()
        interval_s: float | None = now - self._last
        if self._first is None:
            self._first = now
            interval_s = None
            self._metrics.first_token(now - self._start)
        self._metrics.tokens_generated(self._tenant, num_tokens, interval_s)
        self._last = now
        self._num_tokens += num_tokens

    def finished(self, reason: str) -> None:
        """The choice is complete: stop, length or abort."""
        self._ended = True
        first_s = None if self._first is None else self._first - self._start
        self._metrics.choice_finished(
            self._tenant, reason, self._num_tokens, first_s, self._clock() - self._start
        )

    def failed(self, code: str) -> None:
        """The choice ended with an error of this code."""
        self._ended = True
        self._metrics.choice_failed(self._tenant, code)

    def refused(self) -> None:
        """The choice was refused while it waited; that is counted where it was decided."""
        self._ended = True

    def aborted_unless_ended(self) -> None:
        """Cleanup on every path: what neither finished nor failed was aborted."""
        if not self._ended:
            self.finished("abort")
