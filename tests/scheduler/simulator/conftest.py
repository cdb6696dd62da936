"""A small device and model, with which simulations end in fractions of a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from weft_scheduler.simulator.device_model import Roofline
from weft_scheduler.simulator.gpus import GPUS, choose_limits
from weft_scheduler.simulator.jobs import JobSpec
from weft_scheduler.simulator.shapes import SHAPES
from weft_scheduler.simulator.simulation import Setup
from weft_scheduler.simulator.trace import Trace, TraceRequest

SHAPE, GPU = SHAPES["llama-3.2-1b"], GPUS["a100"]


def make_trace(num: int, rate: float, *, seed: int = 0, adapters: int = 0, tenants: int = 2) -> Trace:
    random = Random(seed)
    now, requests = 0.0, []
    for _ in range(num):
        now += random.expovariate(rate)
        requests.append(
            TraceRequest(
                now,
                random.randint(1, 1500),
                random.randint(1, 120),
                f"tenant-{random.randrange(tenants)}",
                f"adapter-{random.randrange(adapters)}" if adapters else None,
            )
        )
    return tuple(requests)


def make_setup(*, num_jobs: int = 1, adapters: int = 0, **changes: Any) -> Setup:
    limit_changes = changes.pop("limits", {})
    jobs = changes.pop("jobs", tuple(JobSpec(f"job-{idx}", f"trainer-{idx}") for idx in range(num_jobs)))
    setup = Setup(
        limits=replace(choose_limits(SHAPE, GPU, "nf4", max_model_len=4096), **limit_changes),
        device=Roofline(SHAPE, GPU, "nf4"),
        gpu=GPU,
        jobs=jobs,
        adapter_elements={f"adapter-{idx}": SHAPE.adapter_elements(8) for idx in range(adapters)},
        job_elements={job.job_id: SHAPE.adapter_elements(job.rank) for job in jobs},
    )
    return replace(setup, **changes)


@pytest.fixture(name="make_trace")
def _make_trace() -> Callable[..., Trace]:
    return make_trace


@pytest.fixture(name="make_setup")
def _make_setup() -> Callable[..., Setup]:
    return make_setup
