"""What a resident adapter is worth: the predicted rate of its reuse times the cost of bringing it back.

Pure and small, so that policies can be compared on traces. Owns the history of uses, of adapters that have
left too; it knows neither places nor why an adapter may not leave: `residency` asks for the value of those
that may, and evicts the run of neighbours whose values add up to the least.

The rate is an exponentially forgotten number of uses: one that has just happened counts 1, one that lies
`half_life` uses (of any adapters) back counts 1/2. With a long half-life it is a frequency, with a short one
recency; in between it follows popularity that drifts.

Source: the combined recency and frequency of LRFU (Lee et al., IEEE Trans. Computers 2001), times cost and
size as in GreedyDual-Size-Frequency (Cherkasova, 1998).
"""

from __future__ import annotations

from typing import Protocol

RELOAD_OVERHEAD_ELEMENTS = 1 << 20
"""The fixed latency of a reload, as the number of elements copied in that time: small adapters are dear for
their size.
"""

HALF_LIFE_USES = 1000.0
"""Uses after which a use counts half. Chosen on the traces of `benchmarks/adapter_eviction.py`."""

_MAX_REMEMBERED = 1 << 14


def reload_cost(num_elements: int) -> float:
    """The cost of a reload, in elements copied."""
    return float(RELOAD_OVERHEAD_ELEMENTS + num_elements)


class EvictionPolicy(Protocol):
    """Learns of uses and prices evictions."""

    def used(self, key: str) -> None:
        """A request has begun to use an adapter."""

    def value(self, key: str, num_elements: int) -> float:
        """What is lost when a resident adapter leaves now; comparable among adapters, and never negative."""


class DecayedFrequency:
    """Values by predicted reuse and reload cost. Time is counted in uses, so that it does not depend on the
    load.
    """

    def __init__(self, half_life: float = HALF_LIFE_USES, max_remembered: int = _MAX_REMEMBERED) -> None:
        """Forget by half in `half_life` uses; remember at most `max_remembered` adapters.

        Raises:
            ValueError: a number is not positive.
        """
        if half_life <= 0.0 or max_remembered < 1:
            raise ValueError(
                f"half_life is {half_life} and max_remembered {max_remembered}; both must be positive"
            )
        self._half_life = half_life
        self._max_remembered = max_remembered
        self._num_uses = 0
        self._counts: dict[str, tuple[float, int]] = {}

    def used(self, key: str) -> None:
        """Count one use. When too many are remembered, the lesser half is forgotten."""
        self._num_uses += 1
        self._counts[key] = (self.rate(key) + 1.0, self._num_uses)
        if len(self._counts) > self._max_remembered:
            kept = sorted(self._counts, key=self.rate, reverse=True)[: (self._max_remembered + 1) // 2]
            self._counts = {key: self._counts[key] for key in kept}

    def rate(self, key: str) -> float:
        """The forgotten number of uses, proportional to the predicted rate; 0 for an unknown adapter."""
        known = self._counts.get(key)
        if known is None:
            return 0.0
        count, last = known
        return float(count * 0.5 ** ((self._num_uses - last) / self._half_life))

    def value(self, key: str, num_elements: int) -> float:
        """Predicted rate of reuse times reload cost."""
        return self.rate(key) * reload_cost(num_elements)
