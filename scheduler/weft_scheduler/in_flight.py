"""A plan that is made and not committed, with everything that its commit needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft_scheduler.features import PlanFeatures
from weft_scheduler.outcomes import StepResult
from weft_scheduler.plan import StepPlan
from weft_scheduler.requests import Sequence
from weft_scheduler.training import Job, Pack

if TYPE_CHECKING:
    from weft_scheduler.draft import PlanDraft


@dataclass(frozen=True, slots=True, eq=False)
class InFlight:
    """A plan that is made and not committed, with the states that its outcomes belong to.

    `draft` is what it was made from. `charges` are the seconds that each tenant has been charged for its
    predicted time; `written` says up to which token the plan writes keys and values of a sequence.
    """

    plan: StepPlan
    draft: PlanDraft
    features: PlanFeatures
    charges: dict[str, float]
    is_flex: bool
    num_decodes: int
    has_prefill: bool
    has_training: bool
    written: tuple[tuple[Sequence, int], ...]
    sampled: tuple[Sequence, ...]
    done: tuple[Pack, ...]
    stepped: tuple[Job, ...]

    def check_result(self, result: StepResult) -> None:
        """Every sequence that sampled and is still alive has its token.

        Raises:
            ValueError: naming the sequence without one.
        """
        for sequence in self.sampled:
            if sequence.spec.sequence_id not in result.sampled and not sequence.is_finished:
                raise ValueError(f"the result has no token for sequence {sequence.spec.sequence_id}")
