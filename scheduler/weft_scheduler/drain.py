"""How long a tenant's waiting requests will take: their price over the rate at which the tenant is served.

Prices are stand-alone seconds of the cost model. The rate is stand-alone seconds per second of the recent
past, so that batching, the tenant's share and its concurrency are all in it. Knows no queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

_MEMORY_S = 10.0
"""The past is forgotten exponentially, with this time constant."""

_PRIOR_S = 0.1
"""So much time at rate 1 (served as if alone) stands for what is not known yet."""

_NEWEST_SHARE = 1 / 16
_MAX_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class TenantQueue:
    """A tenant's waiting requests, and the predicted seconds until all of them have been admitted."""

    num_waiting: int
    drain_s: float


@dataclass(slots=True)
class _Flow:
    """Served seconds and the seconds that it took, both fading; the usual length of an answer."""

    updated_s: float
    served_s: float = 0.0
    active_s: float = 0.0
    usual_tokens: float | None = None

    def faded(self, now_s: float) -> tuple[float, float]:
        """Both sums as of `now_s`."""
        keep = exp(-max(0.0, now_s - self.updated_s) / _MEMORY_S)
        return self.served_s * keep, self.active_s * keep + _MEMORY_S * (1.0 - keep)


class ServiceMeter:
    """What every tenant has been given lately. Reading is safe from another thread than the writer's."""

    def __init__(self) -> None:
        """Start knowing nothing."""
        self._flows: dict[str, _Flow] = {}

    def begin(self, tenant: str, now_s: float) -> None:
        """A tenant that had nothing under way has something: time counts again from now on."""
        flow = self._flows.get(tenant)
        if flow is not None:
            flow.updated_s = now_s
            return
        if len(self._flows) >= _MAX_REMEMBERED:
            del self._flows[next(iter(self._flows))]
        self._flows[tenant] = _Flow(now_s)

    def serve(self, tenant: str, price_s: float, now_s: float) -> None:
        """Work of a stand-alone price has been done for a tenant."""
        flow = self._flows.get(tenant)
        if flow is None:
            return
        served_s, active_s = flow.faded(now_s)
        flow.served_s, flow.active_s, flow.updated_s = served_s + price_s, active_s, now_s

    def finish(self, tenant: str, num_tokens: int) -> None:
        """An answer of a tenant has ended after so many tokens."""
        flow = self._flows.get(tenant)
        if flow is None:
            return
        usual = flow.usual_tokens
        flow.usual_tokens = num_tokens if usual is None else usual + _NEWEST_SHARE * (num_tokens - usual)

    def expected_tokens(self, tenant: str, num_answers: int, max_tokens: int) -> float:
        """How many tokens so many answers are likely to have, of at most `max_tokens` together."""
        flow = self._flows.get(tenant)
        if flow is None or flow.usual_tokens is None:
            return max_tokens
        return min(num_answers * flow.usual_tokens, max_tokens)

    def drain_s(self, tenant: str, price_s: float, now_s: float) -> float:
        """Seconds until work of a stand-alone price has been done for a tenant, at its recent rate."""
        flow = self._flows.get(tenant)
        served_s, active_s = (0.0, 0.0) if flow is None else flow.faded(now_s)
        return max(0.0, price_s) * (active_s + _PRIOR_S) / (served_s + _PRIOR_S)
