"""Learning rates by optimizer step, with the definitions of transformers' `get_scheduler`."""

from __future__ import annotations

import math

from weft_server.protocol import JobSpec


def learning_rate(spec: JobSpec, step: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `spec.total_steps`.

    A warm-up begins at zero, as in transformers; it never takes all steps, so a job of one step trains.
    """
    warmup_steps = min(math.ceil(spec.total_steps * spec.warmup_ratio), spec.total_steps - 1)
    if step < warmup_steps:
        return spec.learning_rate * step / max(1, warmup_steps)
    remaining = max(1, spec.total_steps - warmup_steps)
    if spec.lr_scheduler == "linear":
        return spec.learning_rate * max(0.0, (spec.total_steps - step) / remaining)
    if spec.lr_scheduler == "cosine":
        progress = (step - warmup_steps) / remaining
        return spec.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return spec.learning_rate
