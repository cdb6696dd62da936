"""The budgets of the two classes of requests, and what committed iterations teach them.

A plan is made within the default class's budget as long as one of its requests is there, else within flex's.
"""

from __future__ import annotations

from weft_scheduler.budget import FILLED, BudgetController, LatencyTargets
from weft_scheduler.in_flight import InFlight


class ClassBudgets:
    """One controller for each class."""

    def __init__(self, default: LatencyTargets, flex: LatencyTargets | None, max_inflight: int) -> None:
        """Without targets of its own, flex may take `FLEX_FACTOR` times as long."""
        self.default = BudgetController(default, max_inflight)
        self.flex = BudgetController(flex or default.relaxed(), max_inflight)
        self._decodes_committed_s: float | None = None

    def of(self, *, is_flex: bool) -> BudgetController:
        """The controller of a class."""
        return self.flex if is_flex else self.default

    def observe(self, ran: InFlight, elapsed_s: float, now_s: float) -> None:
        """Learn from a committed iteration, and from the first tokens that it is about to give."""
        self.of(is_flex=ran.is_flex).observe(
            self._interval_s(ran, elapsed_s, now_s),
            ran.num_decodes,
            has_prefill=ran.has_prefill,
            has_training=ran.has_training,
            is_filled=ran.plan.predicted_s >= FILLED * ran.plan.budget_s,
        )
        for sequence in ran.sampled:
            if sequence.num_generated == 0 and not sequence.is_finished:
                self.of(is_flex=sequence.is_flex).observe_first_token(now_s - sequence.arrived_s)

    def _interval_s(self, ran: InFlight, elapsed_s: float, now_s: float) -> float:
        """How long those who decode have waited: from commit to commit, what the engine does between
        iterations included.
        """
        interval_s = elapsed_s
        if ran.num_decodes and self._decodes_committed_s is not None:
            interval_s = max(interval_s, now_s - self._decodes_committed_s)
        self._decodes_committed_s = now_s if ran.num_decodes else None
        return interval_s
