"""How a request wants to be treated beside others: its tier, its priority, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass

from weft_server.errors import DeadlineExceeded
from weft_server.protocol import Tier


@dataclass(frozen=True, slots=True)
class RequestClass:
    """The class of one request.

    Lower `priority` goes first among the tenant's requests of a tier. `timeout_s` counts from `arrived_s`, a
    time on the service's clock.
    """

    tier: Tier = "default"
    priority: int = 0
    timeout_s: float | None = None
    arrived_s: float = 0.0

    def remaining_s(self, now_s: float) -> float | None:
        """Seconds until the deadline; None without one.

        Raises:
            DeadlineExceeded: it has passed.
        """
        if self.timeout_s is None:
            return None
        left_s = self.arrived_s + self.timeout_s - now_s
        if left_s <= 0.0:
            raise self.too_late(0)
        return left_s

    def too_late(self, num_tokens: int) -> DeadlineExceeded:
        """The error of a request whose deadline has passed after so many tokens of a choice."""
        progress = f"after {num_tokens} tokens" if num_tokens else "before the first token"
        return DeadlineExceeded(
            f"The request's 'timeout' of {self.timeout_s:g} s ended {progress}. Allow more time, or ask for "
            "fewer tokens.",
            param="timeout",
        )


DEFAULT_CLASS = RequestClass()
