"""The pure scheduler: decides what every iteration runs, from integers and clocks alone."""

from weft_scheduler.budget import BudgetController, LatencyTargets
from weft_scheduler.cost import CostModel
from weft_scheduler.drain import TenantQueue
from weft_scheduler.features import PlanFeatures
from weft_scheduler.limits import Limits
from weft_scheduler.outcomes import Outcome, PackDone, SequenceToken, StepDone, StepResult
from weft_scheduler.plan import (
    AdapterLoad,
    AdapterMove,
    BackwardSlice,
    MemoryPlan,
    Segment,
    SegmentKind,
    StepPlan,
)
from weft_scheduler.prefix import PrefixSpec, prefix_root
from weft_scheduler.requests import RequestSpec, ServiceTier
from weft_scheduler.scheduler import Scheduler
from weft_scheduler.training import PackSpec

__all__ = [
    "AdapterLoad",
    "AdapterMove",
    "BackwardSlice",
    "BudgetController",
    "CostModel",
    "LatencyTargets",
    "Limits",
    "MemoryPlan",
    "Outcome",
    "PackDone",
    "PackSpec",
    "PlanFeatures",
    "PrefixSpec",
    "RequestSpec",
    "Scheduler",
    "Segment",
    "SegmentKind",
    "SequenceToken",
    "ServiceTier",
    "StepDone",
    "StepPlan",
    "StepResult",
    "TenantQueue",
    "prefix_root",
]
