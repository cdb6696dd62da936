"""Plans that end early: every slice runs exactly once, and nothing that did not run is charged or learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from weft_scheduler import PackDone, StepDone, StepResult


def prepared(make_engine: Callable[..., Any], sizes: list[int]) -> Any:
    """An engine whose next plan is the whole backward of one step of such packs, of two jobs."""
    engine = make_engine(noise=0.0)
    for job in ("a", "b"):
        engine.add_job(job, 64)
    while any(engine.scheduler.adapter_slot(f"job:{job}") is None for job in ("a", "b")):
        engine.step()
    for job in ("a", "b"):
        engine.add_step(job, job, sizes)
    forward = engine.scheduler.plan(engine.now)
    assert (len(forward.forward), len(forward.backward)) == (2, 6)
    engine.scheduler.commit(forward, StepResult({}, 0.004, 0, 0), engine.now)
    return engine


@pytest.mark.parametrize("num_run", range(6))
def test_a_plan_that_ends_early_costs_what_ran(make_engine: Callable[..., Any], num_run: int) -> None:
    engine = prepared(make_engine, [16])
    scheduler = engine.scheduler
    learnt: list[Any] = []
    scheduler.cost.observe = lambda features, elapsed_s: learnt.append((features, elapsed_s))
    before = dict(scheduler.service_s)
    plan = scheduler.plan(engine.now)
    assert len(plan.backward) == 6
    assert not plan.forward
    assert scheduler.num_blocks_held == 0
    assert scheduler.commit(plan, StepResult({}, 0.004, num_run, 0), engine.now) == []
    scheduler.check_invariants()
    assert scheduler.num_blocks_held == 8, "blocks of packs that are not done"
    charged = {tenant: scheduler.service_s[tenant] - before[tenant] for tenant in ("a", "b")}
    assert charged["a"] == pytest.approx(charged["b"])
    assert sum(charged.values()) == pytest.approx(0.004 if num_run else 0.0)
    ((features, elapsed_s),) = learnt
    assert elapsed_s == 0.004
    assert (features.num_backward_slices, features.backward_token_layers) == (num_run, 16 * num_run)
    assert features.num_adapters == (2 if num_run else 0)
    assert features.adapter_elements == (128 if num_run else 0)
    rest = scheduler.plan(engine.now)
    assert [part[1:] for part in rest.backward] == [part[1:] for part in plan.backward[num_run:]]
    done = scheduler.commit(rest, StepResult({}, 0.004), engine.now)
    assert [o for o in done if isinstance(o, PackDone)] == [PackDone("a/0/0"), PackDone("b/0/0")]
    steps = scheduler.plan(engine.now)
    assert steps.optimizer_steps == ("a", "b")
    assert scheduler.commit(steps, StepResult({}, 0.001, 0, 1), engine.now) == [StepDone("a")]
    assert scheduler.plan(engine.now).optimizer_steps == ("b",)


def test_a_job_removed_under_a_plan_that_ends_early_leaves_the_wave_to_the_others(
    make_engine: Callable[..., Any],
) -> None:
    engine = prepared(make_engine, [16])
    scheduler = engine.scheduler
    plan = scheduler.plan(engine.now)
    assert plan.backward[0].pack_ids == ("a/0/0", "b/0/0")
    scheduler.remove_job("a")
    assert scheduler.commit(plan, StepResult({}, 0.004, 3, 0), engine.now) == []
    scheduler.check_invariants()
    rest = scheduler.plan(engine.now)
    assert [part.pack_ids for part in rest.backward] == [("b/0/0",)] * 3
    assert scheduler.commit(rest, StepResult({}, 0.004), engine.now) == [PackDone("b/0/0")]


def test_what_cannot_have_run_is_refused_and_changes_nothing(make_engine: Callable[..., Any]) -> None:
    engine = prepared(make_engine, [16])
    scheduler = engine.scheduler
    plan = scheduler.plan(engine.now)
    for result in (StepResult({}, 0.01, 7), StepResult({}, 0.01, -1), StepResult({}, 0.01, 6, 1)):
        with pytest.raises(ValueError, match="cannot be what has run of 6 and 0"):
            scheduler.commit(plan, result, engine.now)
    assert len(scheduler.commit(plan, StepResult({}, 0.01, 6, 0), engine.now)) == 2


def test_with_plans_in_flight_each_must_run_to_its_end(make_engine: Callable[..., Any]) -> None:
    engine = make_engine(max_inflight=2)
    engine.add_job("a", 64)
    engine.add_step("a", "a", [16])
    while not (plan := engine.step()).backward:
        pass
    while engine.flights[0].plan is not plan:
        engine.commit()
    with pytest.raises(ValueError, match="must run to its end"):
        engine.scheduler.commit(plan, StepResult({}, 0.01, 1, 0), engine.now)
