"""Start-time fair queueing over flows (tenants): who is served next when not everybody can be.

Every flow has a tag, the virtual time at which its next piece of work starts; a charge of `price` moves it on
by `price / weight`. The flow with the smallest tag is served. Virtual time follows the smallest tag of the
backlogged flows, and a flow that returns is lifted to it: idleness is not banked. A backlogged flow that
cannot be served (its adapter is on its way, nothing has room) banks no more than what another one is served
while it gets `MAX_CREDIT`. It does not know what a price stands for.

Source: Goyal, Vin, Cheng: Start-time Fair Queuing (SIGCOMM 1996); Sheng et al.: Fairness in Serving LLMs
(OSDI 2024).
"""

from __future__ import annotations

from collections.abc import Collection
from math import isfinite

MAX_CREDIT = 30.0
"""How far a backlogged flow may be ahead of another one, in units of price, before that one banks no more."""

_MAX_REMEMBERED = 4096


class FairQueue:
    """Tags of flows. Work-conserving: it orders, it never withholds."""

    def __init__(self) -> None:
        """Start at virtual time zero; every flow has weight 1."""
        self.virtual_time = 0.0
        self._tags: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._most_tags = _MAX_REMEMBERED

    def set_weight(self, flow: str, weight: float) -> None:
        """Give a flow `weight` times the share of a flow of weight 1.

        Raises:
            ValueError: the weight is not positive and finite.
        """
        if not (isfinite(weight) and weight > 0.0):
            raise ValueError(f"weight of {flow} is {weight}; it must be a positive, finite number")
        self._weights[flow] = weight

    def activate(self, flow: str) -> None:
        """A flow without a backlog has got work: lift it to the current virtual time."""
        self._tags[flow] = max(self.tag(flow), self.virtual_time)

    def tag(self, flow: str) -> float:
        """The virtual start time of the flow's next piece of work."""
        return self._tags.get(flow, self.virtual_time)

    def weight(self, flow: str) -> float:
        """The weight of a flow."""
        return self._weights.get(flow, 1.0)

    def tag_after(self, flow: str, price: float) -> float:
        """The tag that the flow would have after a charge."""
        return self.tag(flow) + price / self.weight(flow)

    def charge(self, flow: str, price: float) -> None:
        """Account for work of `price` done for a flow; a negative price corrects an earlier one."""
        self._tags[flow] = self.tag_after(flow, price)

    def advance(self, backlogged: Collection[str]) -> None:
        """Move virtual time to the smallest backlogged tag; without a backlog nobody is owed anything: to the
        largest.
        """
        if backlogged:
            tags = {flow: self.tag(flow) for flow in backlogged}
            # In prices, not in tags: one charge moves the tag of a small weight far.
            lowest = max(tag - MAX_CREDIT / self.weight(flow) for flow, tag in tags.items())
            self._tags.update((flow, lowest) for flow, tag in tags.items() if tag < lowest)
            self.virtual_time = max(self.virtual_time, lowest, min(tags.values()))
        elif self._tags:
            self.virtual_time = max(self.virtual_time, max(self._tags.values()))
        if len(self._tags) > self._most_tags:
            self._tags = {flow: tag for flow, tag in self._tags.items() if tag > self.virtual_time}
            self._most_tags = max(_MAX_REMEMBERED, 2 * len(self._tags))
