"""What an iteration costs each tenant.

The time of an iteration is split in two steps, neither of which depends on the order in which the plan was
made. Between inference and finetuning, in proportion to the time that each would have taken alone; within
each, among the tenants in proportion to the sum of their pieces' stand-alone prices. All charges add up to
the iteration's time.

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


def split_time(
    elapsed_s: float, inference: Pieces, inference_s: float, training: Pieces, training_s: float
) -> dict[str, float]:
    """Charges by tenant, in seconds.

    `inference_s` and `training_s` are the times that all inference and all finetuning of the iteration would
    have taken alone.
    """
    charges: dict[str, float] = defaultdict(float)
    both_s = inference_s + training_s
    for pieces, alone_s in ((inference, inference_s), (training, training_s)):
        total = sum(pieces.by_tenant.values())
        if not total or not both_s:
            continue
        rate = elapsed_s * alone_s / both_s / total
        for tenant, price_s in pieces.by_tenant.items():
            charges[tenant] += rate * price_s
    return dict(charges)
