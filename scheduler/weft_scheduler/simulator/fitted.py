"""A device as a server learnt it: the fitted cost model, with the limits and targets that it ran with.

An engine writes it when it stops; `weft simulate --gpu FILE` replays traces on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from weft_scheduler.cost import CostModel
from weft_scheduler.limits import Limits
from weft_scheduler.scheduler import Scheduler
from weft_scheduler.simulator.report import Slo

FORMAT = "weft-cost-model-3"

_DEVIATIONS_PER_MEDIAN = 1.4826
"""Standard deviation over median absolute deviation, of a normal distribution."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """`cost` as it was when the server stopped; `noise` is the spread that it left unexplained."""

    model: str
    device: str
    cost: CostModel
    limits: Limits
    slo: Slo
    max_pack_tokens: int
    noise: float


def describe(scheduler: Scheduler, *, model: str, device: str, max_pack_tokens: int) -> dict[str, Any]:
    """The JSON-able description of a scheduler's device."""
    budget = scheduler.budget
    return {
        "format": FORMAT,
        "model": model,
        "device": device,
        "cost_model": scheduler.cost.to_dict(),
        "limits": asdict(scheduler.limits),
        "slo": {
            "tpot_s": budget.tpot_s,
            "ttft_s": budget.targets.ttft_s,
            "percentile": budget.targets.percentile,
        },
        "max_pack_tokens": max_pack_tokens,
    }


def read_fitted(text: str) -> Fitted:
    """Inverse of `describe`.

    Raises:
        ValueError: it is not such a description, or of another version.
    """
    values = json.loads(text)
    if not isinstance(values, Mapping) or "format" not in values:
        raise ValueError(f'it has no "format": "{FORMAT}"; a server writes such a file when it stops')
    if values["format"] != FORMAT:
        raise ValueError(f"its format is {values['format']!r}; this version reads {FORMAT!r}")
    try:
        cost = values["cost_model"]
        return Fitted(
            model=str(values["model"]),
            device=str(values["device"]),
            cost=CostModel.from_dict(cost),
            limits=Limits(**values["limits"]),
            slo=Slo(**values["slo"]),
            max_pack_tokens=int(values["max_pack_tokens"]),
            noise=_DEVIATIONS_PER_MEDIAN * float(cost["error_p50"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"a field is missing or unknown: {error}") from error
