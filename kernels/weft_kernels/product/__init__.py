"""How products with packed weights are computed: the plans, their measurement, and summing over splits.

Shared by the weight formats. Knows nothing of how a format encodes values.
"""

from weft_kernels.product.plan import (
    LIBRARY,
    MAX_PLANNED_ROWS,
    ROW_BUCKETS,
    Direction,
    Plan,
    PlanTable,
    Tiles,
    candidates,
    default_plan,
    row_bucket,
)

__all__ = [
    "LIBRARY",
    "MAX_PLANNED_ROWS",
    "ROW_BUCKETS",
    "Direction",
    "Plan",
    "PlanTable",
    "Tiles",
    "candidates",
    "default_plan",
    "row_bucket",
]
