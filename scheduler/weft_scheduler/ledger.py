"""What tenants have been charged for iterations.

A plan is charged for when it is made, at its predicted time, so that the next plan knows; when it is
committed, the charges are corrected to what has run and how long that took.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from math import isfinite

from weft_scheduler.fairness import FairQueue
from weft_scheduler.in_flight import InFlight


class Ledger:
    """Moves the tenants' tags in `shares`, and remembers the sums."""

    def __init__(self, shares: FairQueue) -> None:
        """Nobody has been charged."""
        self._shares = shares
        self.service_s: defaultdict[str, float] = defaultdict(float)
        """Seconds of iterations charged to each tenant so far, inference and finetuning together."""

    def charge(self, made: InFlight) -> None:
        """A plan has been made."""
        self._add(made.charges, 1.0)

    def settle(self, made: InFlight, ran: InFlight, elapsed_s: float) -> None:
        """A plan has been committed; of what was made, `ran` has run, in `elapsed_s`."""
        if ran is not made:
            self._add(made.charges, -1.0)
            self._add(ran.charges, 1.0)
        predicted_s = ran.plan.predicted_s
        if predicted_s > 0.0 and isfinite(elapsed_s) and elapsed_s > 0.0:
            self._add(ran.charges, elapsed_s / predicted_s - 1.0)

    def _add(self, charges: Mapping[str, float], factor: float) -> None:
        for tenant, charge_s in charges.items():
            self._shares.charge(tenant, charge_s * factor)
            self.service_s[tenant] += charge_s * factor
