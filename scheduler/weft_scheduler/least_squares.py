"""Weighted least squares over relative errors with non-negative parameters, updated one observation at a
time.

Knows numbers alone: an observation is a sparse row of coefficients and a positive time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class NormalEquations:
    """The problem `A θ = b` that a weighted sum of squared relative errors leads to."""

    def __init__(self, size: int) -> None:
        """Start without observations of `size` parameters."""
        self.size = size
        self.a = [[0.0] * size for _ in range(size)]
        self.b = [0.0] * size

    @classmethod
    def of_parameters(cls, theta: Sequence[float]) -> NormalEquations:
        """A pull of every single parameter to its value in `theta`, which is positive."""
        normal = cls(len(theta))
        for idx, value in enumerate(theta):
            normal.a[idx][idx] = 1.0 / value**2
            normal.b[idx] = 1.0 / value
        return normal

    def add(self, phi: Mapping[int, float], seconds: float, weight: float) -> None:
        """Add one observation, weighted by `weight / seconds²`."""
        weight /= seconds * seconds
        for i, x in phi.items():
            row, scaled = self.a[i], weight * x
            self.b[i] += scaled * seconds
            for j, y in phi.items():
                row[j] += scaled * y

    def scale(self, factor: float) -> None:
        """Multiply every weight by `factor`."""
        self.a = [[value * factor for value in row] for row in self.a]
        self.b = [value * factor for value in self.b]

    def for_speed(self, factor: float, weight: float = 1.0) -> NormalEquations:
        """The problem of a machine on which everything takes `factor` times as long, `weight` times as
        heavy.
        """
        slower = NormalEquations(self.size)
        slower.a = [[value * weight / factor**2 for value in row] for row in self.a]
        slower.b = [value * weight / factor for value in self.b]
        return slower

    def plus(self, other: NormalEquations) -> NormalEquations:
        """The sum of two problems."""
        total = NormalEquations(self.size)
        total.a = [[x + y for x, y in zip(p, q, strict=True)] for p, q in zip(self.a, other.a, strict=True)]
        total.b = [x + y for x, y in zip(self.b, other.b, strict=True)]
        return total

    def solve(self, theta: list[float], num_sweeps: int) -> None:
        """Improve `theta` in place by cyclic coordinate descent, kept non-negative."""
        for _ in range(num_sweeps):
            for idx, row in enumerate(self.a):
                pull = self.b[idx] - sum(x * y for x, y in zip(row, theta, strict=True))
                theta[idx] = max(0.0, theta[idx] + pull / row[idx])
