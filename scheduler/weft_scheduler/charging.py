"""What an iteration costs each tenant.

The time of an iteration is split in two steps, neither of which depends on the order in which the plan was
made. Between inference, finetuning and the reading of adapters, in proportion to the time that each would
have taken alone; within each, among the tenants in proportion to the sum of their pieces' stand-alone prices.
All charges add up to the iteration's time.

Pieces alone would make a decode as dear as streaming all weights, so that thirty of them outweighed a window
of five hundred finetuning tokens tenfold; batches alone would make a tenant with one decode pay as much as
one with thirty.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass(slots=True)
class Pieces:
    """Stand-alone prices (seconds) of a plan's pieces, summed by tenant, for one class of work."""

    by_tenant: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, tenant: str, price_s: float) -> None:
        """One more piece of a tenant."""
        self.by_tenant[tenant] += price_s


def split_time(elapsed_s: float, *classes: tuple[Pieces, float]) -> dict[str, float]:
    """Charges by tenant, in seconds: of each class its pieces, and the time that all of it would have taken
    alone.
    """
    charges: dict[str, float] = defaultdict(float)
    all_s = sum(alone_s for _, alone_s in classes)
    for pieces, alone_s in classes:
        total = sum(pieces.by_tenant.values())
        if not total or not all_s:
            continue
        rate = elapsed_s * alone_s / all_s / total
        for tenant, price_s in pieces.by_tenant.items():
            charges[tenant] += rate * price_s
    return dict(charges)
