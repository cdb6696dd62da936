"""Numbers from samples: percentiles, interleaved timings, ratios between rivals of the same round.

A machine's speed drifts, so rivals take turns in rounds, and of two of them the median over rounds of their
ratio within a round is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TypeVar

import torch

_FLUSH_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""More than the last-level caches hold."""

T = TypeVar("T")

Timings = dict[str, list[float]]
"""Seconds by rival, one for each round."""


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile of samples, interpolated linearly.

    Raises:
        ValueError: no samples, or not a percentage.
    """
    if not values or not 0.0 <= percent <= 100.0:
        raise ValueError(f"percentile {percent} of {len(values)} values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100.0
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return median(a / b for a, b in zip(numerators, denominators, strict=True))


class Stopwatch:
    """Times calls on one device; `cold` flushes its caches before each, so that operands come from memory."""

    def __init__(self, device: torch.device, *, cold: bool = False) -> None:
        self._device = device
        size = _FLUSH_BYTES[device.type] // 4
        self._flushed = torch.zeros(size, dtype=torch.int32, device=device) if cold else None

    def seconds(self, call: Callable[[], object]) -> float:
        """How long the call takes: on a GPU by events around it, else by the clock."""
        if self._flushed is not None:
            # Also keeps a GPU busy while the host launches the call, whose own launch time is then hidden.
            self._flushed.add_(1)
        if self._device.type != "cuda":
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000.0


def interleave(
    calls: Mapping[str, Callable[[], T]],
    measure: Callable[[Callable[[], T]], float],
    *,
    budget_s: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    warm_ups: int = 2,
) -> Timings:
    """Rounds in which every rival is measured once, in turn from round to round.

    Args:
        calls: what is measured, by name.
        measure: seconds of one call, e.g. `Stopwatch.seconds`.
        budget_s: begin no further round after this long (but `min_rounds` in any case).
        warm_ups: unmeasured calls of each (the first compiles kernels).
    """
    for _ in range(warm_ups):
        for call in calls.values():
            call()
    timings: Timings = {name: [] for name in calls}
    names = list(calls)
    started = time.perf_counter()
    for round_idx in range(max_rounds):
        if round_idx >= min_rounds and time.perf_counter() - started > budget_s:
            break
        shift = round_idx % len(names)
        for name in names[shift:] + names[:shift]:
            timings[name].append(measure(calls[name]))
    return timings


def thread_candidates(num_cores: int) -> list[int]:
    """Thread counts worth trying: powers of two, and all cores."""
    powers = [1 << power for power in range(num_cores.bit_length()) if 1 << power < num_cores]
    return [*powers, num_cores]


def sweep_threads(
    call: Callable[[], float], candidates: Sequence[int], *, repeats: int = 2
) -> dict[int, float]:
    """Median of what a call returns, seconds, at each thread count of torch, which stays at the best one."""
    seconds: dict[int, float] = {}
    for num_threads in candidates:
        torch.set_num_threads(num_threads)
        call()
        seconds[num_threads] = median(call() for _ in range(repeats))
    torch.set_num_threads(best_threads(seconds))
    return seconds


def best_threads(seconds: Mapping[int, float]) -> int:
    """The thread count of the least time."""
    return min(seconds, key=lambda num_threads: seconds[num_threads])
