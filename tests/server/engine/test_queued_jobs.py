"""Many jobs on one engine: only those whose adapter has a place hold training state on the device, few of the
others are in memory at all, and every tenant gets its turn."""

from __future__ import annotations

from weft_server.errors import Unavailable

LENGTHS = (31, 12, 44, 7)
NUM_JOBS = 12


def _arena_for_two_jobs(make):
    """Half of an arena is for training."""
    return {"arena_elements": 4 * make.adapter(1).num_elements, "num_adapter_slots": 8}


def _watch(h, seen):
    active, loading = h.engine._jobs.active, h.engine._jobs._loading
    placed = [job for job in active.values() if job.has_place]
    waiting = [job for job in active.values() if not job.has_place and not job.is_finished]
    seen.append((len(placed), len(waiting) + len(loading)))
    return all(h.ended(name) for name in h.started)


def _start(h, make, name, tenant, **changes):
    h.started = [*getattr(h, "started", []), name]
    h.start_job(name, make.dataset(LENGTHS), make.spec(total_steps=2, **changes), tenant=tenant)


def test_queued_jobs_take_device_memory_and_host_memory_one_after_the_other(harness, make):
    h = harness(**_arena_for_two_jobs(make))
    for idx in range(NUM_JOBS):
        _start(h, make, f"job{idx}", "tenant", seed=idx)
    seen = []
    h.run(until=lambda: _watch(h, seen))
    assert max(placed for placed, _ in seen) == 2
    assert max(waiting for _, waiting in seen) <= 4
    assert all(len(h.losses(name)) == 2 for name in h.started)
    h.run()


def test_a_queue_of_one_tenant_does_not_keep_out_another(harness, make):
    h = harness(**_arena_for_two_jobs(make))
    for idx in range(NUM_JOBS):
        _start(h, make, f"job{idx}", "many", seed=idx)
    _start(h, make, "single", "other")
    h.run(until=lambda: h.ended("single"))
    unfinished = [name for name in h.started if not h.ended(name)]
    assert len(unfinished) >= NUM_JOBS // 2
    h.run()


def test_a_job_that_waits_in_line_can_be_cancelled_and_is_counted(harness, make):
    h = harness(**_arena_for_two_jobs(make))
    for idx in range(NUM_JOBS):
        _start(h, make, f"job{idx}", "tenant", seed=idx)
    assert h.engine.heartbeat().gauges["num_finetune_jobs_running"] == NUM_JOBS
    h.messages += h.engine._jobs.cancel(f"job{NUM_JOBS - 1}")
    h.run()
    assert type(h.ended(f"job{NUM_JOBS - 1}")).__name__ == "JobStopped"
    assert not h.losses(f"job{NUM_JOBS - 1}")
    assert len(h.losses(f"job{NUM_JOBS - 2}")) == 2


def test_the_state_of_a_finished_job_leaves_the_device(harness, make):
    def put(chunks):
        raise Unavailable("the store is away")

    h = harness(put=put)
    h.start_job("job", make.dataset(LENGTHS), make.spec(total_steps=1))
    h.run(until=lambda: h.losses("job"))
    assert not any(job.has_place for job in h.engine._jobs.active.values())
