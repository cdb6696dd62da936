"""The optimizer step: part of the iteration whose plan names it, and harmless where a loss is not finite."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from weft_scheduler.plan import BackwardSlice, StepPlan
from weft_server.engine import device_clock
from weft_server.training.job import JobError
from weft_server.training.optimizer import FlatAdamW

STEP = StepPlan(0, (), optimizer_steps=("job",))


@pytest.fixture
def job_and_bench(bench, make):
    config = make.config()
    b = bench(config, torch.float32, 16)
    job = b.add_job(make.dataset((20, 11), config.vocab_size), make.adapter(config, 5), make.spec())
    b.accumulate_gradients("job")
    return job, b


def test_an_iteration_takes_the_time_of_its_optimizer_steps_as_well(job_and_bench, monkeypatch):
    _, b = job_and_bench
    now = [50.0]
    monkeypatch.setattr(device_clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    step = FlatAdamW.step

    def slow_step(*args):
        now[0] += 0.25
        return step(*args)

    monkeypatch.setattr(FlatAdamW, "step", slow_step)
    handle = b.runner.submit(STEP, b.jobs)
    now[0] += 100.0  # until somebody asks for the result
    assert handle.result().elapsed_s == pytest.approx(0.25)


def test_the_optimizer_step_is_issued_with_its_iteration_and_reported_when_that_is_done(job_and_bench):
    job, b = job_and_bench
    before = job.optimizer.master.clone()
    handle = b.runner.submit(STEP, b.jobs)
    assert not torch.equal(job.optimizer.master, before)
    assert job.num_steps_done == 0
    assert handle.result().steps["job"].step == job.num_steps_done == 1


def test_an_optimizer_step_behind_an_interrupted_backward_is_not_issued(job_and_bench):
    job, b = job_and_bench
    before, pack_ids = job.optimizer.master.clone(), (job._packs[0].pack_id,)
    plan = StepPlan(0, (), backward=(BackwardSlice(9, pack_ids, 0, 0),), optimizer_steps=("job",))
    result = b.runner.submit(plan, b.jobs, lambda: True).result()
    assert (result.num_slices, result.num_optimizer_steps, result.steps) == (1, 0, {})
    assert torch.equal(job.optimizer.master, before)
    result = b.runner.submit(STEP, b.jobs, lambda: True).result()
    assert (result.num_slices, result.num_optimizer_steps) == (0, 1)
    assert result.steps["job"].step == 1
    assert not torch.equal(job.optimizer.master, before)


@pytest.mark.parametrize(
    ("where", "code", "message"),
    [
        ("loss", "non_finite_loss", "example on line {1};"),
        ("gradient", "non_finite_gradient", "lines {0}, {1}"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_says_where(where, code, message, job_and_bench):
    job, b = job_and_bench
    before, lines = job.optimizer.state(), job._packs[0].lines
    if where == "loss":
        job._packs[0].losses[-1] = torch.nan
    else:
        job.optimizer.grad[3] = torch.inf
    error = b.runner.submit(STEP, b.jobs).result().steps["job"]
    assert isinstance(error, JobError)
    assert error.code == code
    assert message.format(*lines) in error.message
    for name, tensor in job.optimizer.state().items():
        assert torch.equal(tensor, before[name]), name
