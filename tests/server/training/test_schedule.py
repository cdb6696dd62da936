"""Learning rates against transformers' schedulers."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from weft_server.training.schedule import learning_rate


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total_steps", "warmup_ratio"), [(30, 0.1), (113, 0.03), (7, 0.0), (50, 0.5)])
def test_every_step_has_the_rate_of_transformers(kind, total_steps, warmup_ratio, make):
    spec = make.spec(
        total_steps=total_steps, warmup_ratio=warmup_ratio, lr_scheduler=kind, learning_rate=2e-4
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=spec.learning_rate)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = transformers.get_scheduler(
        name, optimizer, math.ceil(total_steps * warmup_ratio), total_steps
    )
    for step in range(total_steps):
        assert learning_rate(spec, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_a_job_of_one_step_trains(make):
    assert learning_rate(make.spec(total_steps=1, warmup_ratio=0.03, learning_rate=2e-4), 0) == 2e-4
