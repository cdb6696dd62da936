"""Threads, wait policy and priority: a brief sweep for every contender, so that each runs at its best.

OpenMP threads that spin beside a busy neighbour can cost it, and themselves, ten times their speed; threads
that sleep wake up late. Which is better depends on who else runs, so it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from weft_server.bench.coserve.process import Tuning

T = TypeVar("T")
_SPINS = 1000
"""Rounds that threads spin before they sleep, as those of the engine do."""


@dataclass(frozen=True, slots=True)
class Trial(Generic[T]):
    """One candidate and how good it was; more is better."""

    candidate: T
    score: float
    note: str


@dataclass(frozen=True, slots=True)
class Sweep(Generic[T]):
    """All trials of a contender."""

    contender: str
    trials: tuple[Trial[T], ...]

    @property
    def best(self) -> T:
        """The candidate with the highest score."""
        return max(self.trials, key=lambda trial: trial.score).candidate


def sweep(contender: str, candidates: Sequence[T], measure: Callable[[T], tuple[float, str]]) -> Sweep[T]:
    """Measure every candidate: a score, and a note for the table."""
    return Sweep(contender, tuple(Trial(one, *measure(one)) for one in candidates))


def single_candidates(num_cores: int, *, is_quick: bool) -> list[Tuning]:
    """For a process that has the machine to itself; the first one is taken unseen in a quick run."""
    briefly = Tuning(num_cores, spins=_SPINS)
    if is_quick:
        return [briefly]
    fewer = [Tuning(num_cores // 2)] if num_cores > 1 else []
    return [briefly, Tuning(num_cores), Tuning(num_cores, "ACTIVE"), *fewer]


def pair_candidates(num_cores: int, *, is_quick: bool) -> list[tuple[Tuning, Tuning]]:
    """For a generator and a trainer that run at the same time."""
    half = max(1, num_cores // 2)
    found = [(Tuning(half), Tuning(half)), (Tuning(num_cores), Tuning(num_cores, nice=19))]
    if not is_quick:
        found.append((Tuning(num_cores), Tuning(num_cores)))
        found.append((Tuning(num_cores, spins=_SPINS), Tuning(num_cores, spins=_SPINS, nice=19)))
        found.append((Tuning(num_cores, "ACTIVE"), Tuning(num_cores, "ACTIVE")))
        found.append((Tuning(half), Tuning(half, nice=19)))
    return found


def turn_candidates(num_cores: int, *, is_quick: bool) -> list[tuple[Tuning, Tuning]]:
    """For a generator and a trainer that take turns: neither computes while the other does."""
    policies = [Tuning(num_cores, spins=_SPINS), Tuning(num_cores), Tuning(num_cores, "ACTIVE")]
    return [(policy, policy) for policy in policies[: 1 if is_quick else None]]
