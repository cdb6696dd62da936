"""How many tokens a second are decoded lately, over all requests."""

from __future__ import annotations

from math import exp

MEMORY_S = 5.0
"""After this time a token counts 1/e."""


class DecodeDemand:
    """An exponentially forgotten rate."""

    def __init__(self) -> None:
        """Nothing has been decoded."""
        self._num_tokens = 0.0
        self._at_s = 0.0

    def add(self, num_tokens: int, now_s: float) -> None:
        """So many tokens are decoded now."""
        self._num_tokens = self._remembered(now_s) + num_tokens
        self._at_s = now_s

    def tokens_per_s(self, now_s: float) -> float:
        """The rate over the last `MEMORY_S` or so."""
        return self._remembered(now_s) / MEMORY_S

    def _remembered(self, now_s: float) -> float:
        return self._num_tokens * exp(min(0.0, self._at_s - now_s) / MEMORY_S)
