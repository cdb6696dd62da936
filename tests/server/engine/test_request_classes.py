"""Tiers, priorities, deadlines and concurrency, from the messages to what engines do."""

from __future__ import annotations

import pytest

from weft_server.protocol import Generate, SamplingParams, SetTenantConcurrency


def ask(h, request_id, prompt, *, tenant="tenant", max_tokens=12, **fields):
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    h.engine.handle(Generate(request_id, tenant, prompt, params, **fields))


def test_default_goes_before_flex_and_then_the_lower_priority(harness, make):
    h = harness(max_num_seqs=1)
    ask(h, "flex", make.prompt(5), tier="flex", priority=-9)
    ask(h, "late", make.prompt(5), priority=2)
    ask(h, "early", make.prompt(5), priority=-2)
    h.run()
    assert list(h.deltas) == ["early", "late", "flex"]


@pytest.mark.parametrize("pipeline_depth", [0, 1])
def test_a_deadline_ends_a_running_request_and_nobody_else(harness, make, oracle, pipeline_depth):
    h = harness(pipeline_depth=pipeline_depth)
    prompt, other = make.prompt(9), make.prompt(6, 1)
    ask(h, "timed", prompt, max_tokens=100, remaining_s=5.0)
    ask(h, "other", other, max_tokens=40)
    h.run(until=lambda: len(h.tokens("timed")) == 7)
    h.clock.now += 5.0
    h.run()
    failure = h.failures()["timed"]
    assert (failure.status, failure.code) == (504, "deadline_exceeded")
    assert h.tokens("timed") == oracle.greedy(prompt, len(h.tokens("timed")))
    assert len(h.tokens("timed")) <= 7 + pipeline_depth
    assert h.tokens("other") == oracle.greedy(other, 40)
    assert h.scheduler.num_blocks_held == 0


def test_a_deadline_ends_a_waiting_request(harness, make):
    h = harness(max_num_seqs=1)
    ask(h, "running", make.prompt(5), max_tokens=30)
    ask(h, "waiting", make.prompt(5, 1), remaining_s=3.0)
    h.step()
    h.clock.now += 2.9
    h.step()
    assert not h.failures()
    h.clock.now += 0.2
    h.step()
    assert list(h.failures()) == ["waiting"]
    h.run()
    assert len(h.tokens("running")) == 30


def test_a_time_that_was_up_on_the_way_is_told_at_once(harness, make):
    h = harness()
    ask(h, "late", make.prompt(5), remaining_s=-0.5)
    h.step()
    assert list(h.failures()) == ["late"]
    assert not h.engine.has_work


def test_heartbeats_tell_the_queues_of_tenants_and_how_long_they_take(harness, make):
    h = harness(max_num_seqs=2)
    h.engine.handle(SetTenantConcurrency({"small": 1}))
    for idx in range(5):
        ask(h, f"a{idx}", make.prompt(5), tenant="small")
        ask(h, f"b{idx}", make.prompt(5), tenant="large")
    h.step()
    queues = h.engine.heartbeat().queues
    assert {tenant: queue.num_waiting for tenant, queue in queues.items()} == {"small": 4, "large": 4}
    assert all(queue.drain_s > 0.0 for queue in queues.values())
    h.run()
    assert h.engine.heartbeat().queues == {}


def test_a_tenants_concurrency_is_kept(harness, make):
    h = harness()
    h.engine.handle(SetTenantConcurrency({"small": 2}))
    for idx in range(6):
        ask(h, f"a{idx}", make.prompt(5), tenant="small")
        ask(h, f"b{idx}", make.prompt(5), tenant="large")
    h.run()
    for plan in h.plans:
        assert sum(segment.sequence_id.startswith("a") for segment in plan.forward) <= 2
    assert max(len(plan.forward) for plan in h.plans) > 4
