"""What every iteration of a window was spent on, by tenant and kind: what a timeline is drawn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from weft_scheduler.plan import SegmentKind, StepPlan

BACKWARD = "backward"
"""The kind of a backward slice; the others are the values of `SegmentKind`."""


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of one tenant and kind in an iteration (of a backward: tokens · layers / all layers)."""

    tenant: str
    kind: str
    tokens: float


@dataclass(frozen=True, slots=True)
class Iteration:
    """One iteration: when it ran, what it held, what it was to take, and who waited for a first token."""

    start_s: float
    end_s: float
    predicted_s: float
    budget_s: float
    parts: tuple[Part, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


class Timeline:
    """Iterations that begin within `[start_s, end_s)`."""

    def __init__(self, start_s: float, end_s: float, num_layers: int, window_tokens: int) -> None:
        """Record nothing outside the window."""
        self.start_s, self.end_s = start_s, end_s
        self._num_layers = num_layers
        self._window_tokens = window_tokens
        self.iterations: list[Iteration] = []

    def record(
        self,
        plan: StepPlan,
        start_s: float,
        end_s: float,
        tenant_of: Mapping[str, str],
        pack_tokens: Mapping[str, tuple[str, int]],
    ) -> None:
        """Take in an iteration; `tenant_of` a request, `pack_tokens` → (tenant, tokens) of a pack."""
        if not self.start_s <= start_s < self.end_s:
            return
        tokens: Counter[tuple[str, str]] = Counter()
        for segment in plan.forward:
            is_training = segment.kind is SegmentKind.TRAIN
            tenant = pack_tokens[segment.sequence_id][0] if is_training else tenant_of[segment.sequence_id]
            tokens[tenant, segment.kind.value] += segment.num_tokens
        backward: dict[str, float] = {}
        for part in plan.backward:
            start = part.window * self._window_tokens
            for pack_id in part.pack_ids:
                tenant, num_tokens = pack_tokens[pack_id]
                share = min(self._window_tokens, num_tokens - start) / self._num_layers
                backward[tenant] = backward.get(tenant, 0.0) + share
        parts = [Part(tenant, kind, float(num)) for (tenant, kind), num in sorted(tokens.items())]
        parts += [Part(tenant, BACKWARD, num) for tenant, num in sorted(backward.items())]
        self.iterations.append(Iteration(start_s, end_s, plan.predicted_s, plan.budget_s, tuple(parts)))
