"""A tiny model, and windows that begin at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from weft_server.bench.coserve.setup import Setup
from weft_server.bench.coserve.window import Window
from weft_server.bench.coserve.workload import WorkloadSpec
from weft_server.bench.shapes import SHAPES


@pytest.fixture(scope="session")
def setup() -> Setup:
    """In fp32, so that right answers agree to rounding."""
    return Setup(
        "tiny",
        dict(SHAPES["tiny"]),
        dtype="float32",
        max_model_len=256,
        num_adapters=3,
        rank=4,
        example_tokens=48,
        max_batch=8,
    )


@pytest.fixture(scope="session")
def workload(setup: Setup) -> Callable[..., WorkloadSpec]:
    """Short requests, as many a second as wanted."""

    def make(requests_per_s: float = 20.0, seconds: float = 0.5, **changes: Any) -> WorkloadSpec:
        fields = {
            "requests_per_s": requests_per_s,
            "seconds": seconds,
            "vocab_size": int(setup.hf_config["vocab_size"]),
            "max_model_len": setup.max_model_len,
            "num_adapters": setup.num_adapters,
            "length_scale": 0.04,
        }
        return WorkloadSpec(**{**fields, **changes})

    return make


@pytest.fixture(scope="session")
def window() -> Callable[..., Window]:
    """A window that begins in a moment."""

    def make(seconds: float = 0.5, drain_s: float = 20.0, **fields: Any) -> Window:
        return Window(time.monotonic() + 0.05, seconds, drain_s, **fields)

    return make
