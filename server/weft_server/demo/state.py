"""What the demo knows while it runs: numbers and texts that the screen draws and the summary prints. No
I/O."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import quantiles

_RATE_WINDOW_S = 3.0
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class Latencies:
    """Per-token latencies of one phase, in seconds, and the tokens and time that the phase had."""

    seconds: list[float] = field(default_factory=list)
    num_tokens: int = 0
    elapsed_s: float = 0.0

    def percentile_ms(self, percent: int) -> float | None:
        """A percentile in milliseconds, or None before there are two values."""
        if len(self.seconds) < 2:
            return None
        return quantiles(self.seconds, n=100, method="inclusive")[percent - 1] * 1000

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second over the phase."""
        return self.num_tokens / self.elapsed_s if self.elapsed_s else 0.0


class Rate:
    """Events a second over the last few seconds."""

    def __init__(self) -> None:
        self._events: deque[tuple[float, int]] = deque()

    def add(self, now: float, count: int = 1) -> None:
        """Note `count` events."""
        self._events.append((now, count))

    def per_second(self, now: float) -> float:
        """The rate now."""
        while self._events and self._events[0][0] < now - _RATE_WINDOW_S:
            self._events.popleft()
        return sum(count for _, count in self._events) / _RATE_WINDOW_S


@dataclass(slots=True)
class Stream:
    """One tenant's generation by its published adapter."""

    tenant: str
    adapter: str
    prompt: str = ""
    text: str = ""
    rate: Rate = field(default_factory=Rate)


@dataclass(slots=True)
class Job:
    """One tenant's finetune job. Exact matches are shares of the held-out prompts."""

    tenant: str
    task: str
    title: str
    status: str = "waiting"
    step: int = 0
    total_steps: int = 0
    losses: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    trained_tokens: int = 0
    model: str | None = None
    started_s: float | None = None
    finished_s: float | None = None
    error: str | None = None
    exact_match_before: float | None = None
    exact_match_after: float | None = None

    @property
    def is_finished(self) -> bool:
        """Whether it will not change any more."""
        return self.status in ("succeeded", "failed", "cancelled")


@dataclass(slots=True)
class DemoState:
    """Everything on the screen."""

    streams: list[Stream]
    jobs: list[Job]
    phase: str = "starting"
    alone: Latencies = field(default_factory=Latencies)
    beside_training: Latencies = field(default_factory=Latencies)
    measured: Latencies | None = None
    tpot_slo_ms: float = 0.0

    @property
    def num_trained_tokens(self) -> int:
        """Tokens trained by both jobs so far."""
        return sum(job.trained_tokens for job in self.jobs)


def sparkline(values: list[float], width: int) -> str:
    """A curve of block characters, the newest `width` buckets of it; empty for no values."""
    if not values:
        return ""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)
