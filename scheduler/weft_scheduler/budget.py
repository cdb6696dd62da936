"""How long an iteration may take: latency targets, and the feedback that keeps the measured percentile on
target.

Owns one number per situation; it does not know what fills the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

SAFETY = 0.9
"""The first budget, as a part of the per-token target."""

FILLED = 0.8
"""The part of the budget from which on an iteration counts as filled."""

FLEX_FACTOR = 4.0
"""How much longer the flex class may wait, unless it has targets of its own."""

MAX_OPEN_S = 0.25
"""The longest that an arrival while nobody waits for tokens should wait for what is under way."""

PROBE_INTERVAL = 64
"""With a relative target, plans of decodes alone after which one goes without finetuning, to be measured."""

_WINDOW = 64
_FIRST_TOKENS = 32
_FEWEST_ALONE = 8
_RECENT_ALONE = 16
_LOWEST, _HIGHEST = 0.1, 1.5
_FASTEST_CUT, _FASTEST_GROWTH = 0.7, 1.05


@dataclass(frozen=True, slots=True)
class LatencyTargets:
    """Per-token latency and time to first token that finetuning yields to, in seconds, at a percentile (0 to
    100).

    With `unloaded_factor`, `tpot_s` is the least per-token target: it is that many times the median of the
    latest iterations of decodes alone, should serving be slower than what was measured before it began.
    """

    tpot_s: float
    ttft_s: float
    percentile: float = 95.0
    unloaded_factor: float | None = None

    def relaxed(self, factor: float = FLEX_FACTOR) -> LatencyTargets:
        """Targets that are `factor` times as long."""
        unloaded = None if self.unloaded_factor is None else self.unloaded_factor * factor
        tpot_s, ttft_s = self.tpot_s * factor, self.ttft_s * factor
        return replace(self, tpot_s=tpot_s, ttft_s=ttft_s, unloaded_factor=unloaded)

    def __post_init__(self) -> None:
        """Refuse targets that nothing can meet.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        if self.tpot_s <= 0.0 or self.ttft_s <= 0.0:
            raise ValueError(f"tpot_s ({self.tpot_s}) and ttft_s ({self.ttft_s}) must be positive")
        if self.unloaded_factor is not None and self.unloaded_factor < 1.0:
            raise ValueError(f"unloaded_factor is {self.unloaded_factor}; it must be at least 1")
        if not 0.0 < self.percentile <= 100.0:
            raise ValueError(f"percentile is {self.percentile}; it must be above 0 and at most 100")


class BudgetController:
    """Closed loop over the iterations that carry decodes, and over the first tokens of requests.

    `decode_budget_s` starts at 0.9 of the target, or at the part of the time to the first token that an
    arrival can spend on each iteration before its own, if that is less; it is never above that. After every
    64 iterations with decodes that were filled up to it, or late, their percentile is compared with the
    target: above it the budget is cut in proportion (by 0.3 at most), below it the budget grows in
    proportion (by 5 % at most), within 0.1 and 1.5 of the target. Iterations that did not need the budget
    do not count, or it would grow while nothing is there to fill it. A fresh window each time, so that old
    iterations are not punished twice.

    `open_budget_s` is how long an arrival may have to wait for the iterations under way, so how long
    finetuning may make them, with decodes or without. It follows the times to the first token in the same
    manner, every 32 of them, between 0.1 of the target and where it started.

    `tpot_s` is the per-token target now: fixed, or following `LatencyTargets.unloaded_factor`.

    Finetuning and prompts are blamed for their own lateness only: where iterations of decodes alone miss the
    target too (a busy machine, a target below what decoding takes), what these take stands in for the target.
    """

    def __init__(self, targets: LatencyTargets, max_inflight: int = 1) -> None:
        """Start from the targets; with several plans in flight an arrival waits for all of them."""
        self.targets = targets
        self.tpot_s = targets.tpot_s
        # An arrival waits for the plans in flight, then for its own prompt.
        self._longest_s = targets.ttft_s / (max_inflight + 2)
        self.decode_budget_s = min(targets.tpot_s * SAFETY, self._longest_s)
        # Without a pipeline an arrival ends the backward under way, which is half of finetuning or more.
        most_s = MAX_OPEN_S * 2.0 if max_inflight == 1 else MAX_OPEN_S / max_inflight
        self._widest_s = max(min(targets.ttft_s / 4.0 / max_inflight, most_s), self.decode_budget_s)
        self.open_budget_s = self._widest_s
        self.measured_s: float | None = None
        self.measured_ttft_s: float | None = None
        self._times: list[float] = []
        self._times_alone: deque[float] = deque(maxlen=_WINDOW)
        self._first_tokens: list[float] = []
        self._decodes_alone: deque[float] = deque(maxlen=_RECENT_ALONE)
        self._num_since_probe = self._num_since_followed = 0

    def wants_probe(self, num_decodes: int, num_prefill_tokens: int) -> bool:
        """Whether a plan of these decodes and prompt tokens should go without finetuning, to be measured."""
        if self.targets.unloaded_factor is None or not num_decodes or num_prefill_tokens:
            return False
        return self._num_since_probe >= PROBE_INTERVAL

    def observe(
        self,
        elapsed_s: float,
        num_decodes: int,
        *,
        has_prefill: bool = False,
        has_training: bool = True,
        is_filled: bool = True,
    ) -> None:
        """Learn the time of a committed iteration; those without decodes delay nobody's next token.

        One that was not filled up to the budget (`is_filled`) and was punctual says nothing of the budget.
        """
        if not num_decodes:
            return
        self._num_since_probe += 1
        self._num_since_followed += 1
        if not (has_training or has_prefill):
            self._times_alone.append(elapsed_s)
            self._decodes_alone.append(elapsed_s)
            self._num_since_probe = 0
        if is_filled or elapsed_s > self.tpot_s:
            self._times.append(elapsed_s)
        if self._num_since_followed >= _WINDOW:
            self._follow_unloaded()
        if len(self._times) < _WINDOW:
            return
        self.measured_s = self._percentile(self._times)
        self._follow_unloaded()
        bar_s = self.tpot_s
        if len(self._times_alone) >= _FEWEST_ALONE:
            bar_s = max(bar_s, self._percentile(self._times_alone))
        ratio = bar_s / max(self.measured_s, 1e-9)
        budget_s = self.decode_budget_s * min(max(ratio, _FASTEST_CUT), _FASTEST_GROWTH)
        self.decode_budget_s = min(max(budget_s, self.tpot_s * _LOWEST), bar_s * _HIGHEST, self._longest_s)
        self._times.clear()
        self._times_alone.clear()

    def observe_first_token(self, ttft_s: float) -> None:
        """Learn how long a request waited for its first token."""
        self._first_tokens.append(ttft_s)
        if len(self._first_tokens) < _FIRST_TOKENS:
            return
        self.measured_ttft_s = self._percentile(self._first_tokens)
        self._first_tokens.clear()
        ratio = self.targets.ttft_s / max(self.measured_ttft_s, 1e-9)
        budget_s = self.open_budget_s * min(max(ratio, _FASTEST_CUT), _FASTEST_GROWTH)
        self.open_budget_s = max(min(budget_s, self._widest_s), self.tpot_s * _LOWEST)

    def _follow_unloaded(self) -> None:
        """Move a relative target, and the budget with it, to what decodes alone take now."""
        self._num_since_followed = 0
        factor = self.targets.unloaded_factor
        if factor is None or len(self._decodes_alone) < _FEWEST_ALONE:
            return
        moved_s = max(self.targets.tpot_s, factor * median(self._decodes_alone))
        self.decode_budget_s = min(self.decode_budget_s * moved_s / self.tpot_s, self._longest_s)
        self.tpot_s = moved_s

    def _percentile(self, times: Sequence[float]) -> float:
        rank = -(-len(times) * self.targets.percentile // 100)
        return sorted(times)[int(rank) - 1]
