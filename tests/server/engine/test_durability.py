"""Checkpoints, resumption and publishing, and a store that is away for a while."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from weft_server.errors import Unavailable
from weft_server.protocol import CancelJob, JobCheckpointed, JobFailed, JobStopped, JobSucceeded, LoraSpec

LENGTHS = (31, 12, 44, 7, 26, 19, 33, 9, 15, 40)


def _spec(make, **changes):
    return make.spec(**({"total_steps": 6, "checkpoint_every": 2} | changes))


def _assert_same_end(resumed, whole, num_before):
    assert resumed.losses("job") == pytest.approx(whole.losses("job")[num_before:], abs=1e-6)
    assert [m.step for m in resumed.progress("job")] == list(range(num_before + 1, 7))
    torch.testing.assert_close(
        resumed.trained("job").weights, whole.trained("job").weights, rtol=1e-6, atol=1e-6
    )
    assert resumed.ended("job").trained_tokens == whole.ended("job").trained_tokens


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("num_before", [2, 4])
def test_a_job_resumed_from_a_checkpoint_ends_as_if_uninterrupted(num_before, dropout, harness, make):
    spec = _spec(make)
    spec = replace(spec, lora=replace(spec.lora, dropout=dropout))
    whole = harness()
    whole.start_job("job", make.dataset(LENGTHS), spec)
    whole.run()
    checkpoint = {m.step: m.blob for m in whole.checkpoints("job")}[num_before]
    resumed = harness(blobs=whole.blobs)
    resumed.start_job("job", make.dataset(LENGTHS), spec, checkpoint_blob=checkpoint, lease_epoch=2)
    resumed.run()
    _assert_same_end(resumed, whole, num_before)
    assert {m.lease_epoch for m in resumed.progress("job")} == {2}


def test_shutting_down_checkpoints_running_jobs(harness, make):
    whole = harness()
    whole.start_job("job", make.dataset(LENGTHS), _spec(make, checkpoint_every=0))
    whole.run()
    stopped = harness(pipeline_depth=1, blobs=whole.blobs)
    stopped.start_job("job", make.dataset(LENGTHS), _spec(make, checkpoint_every=0))
    stopped.run(until=lambda: len(stopped.progress("job")) == 3)
    last = [m for m in stopped.engine.shut_down() if isinstance(m, JobCheckpointed)]
    assert [(m.job_id, m.step) for m in last] == [("job", 3)]
    resumed = harness(blobs=whole.blobs)
    resumed.start_job(
        "job", make.dataset(LENGTHS), _spec(make, checkpoint_every=0), checkpoint_blob=last[0].blob
    )
    resumed.run()
    _assert_same_end(resumed, whole, 3)


def test_a_checkpoint_of_another_job_is_refused(harness, make):
    h = harness()
    h.start_job("first", make.dataset(LENGTHS), _spec(make))
    h.run()
    blob = h.checkpoints("first")[0].blob
    wider = replace(_spec(make), lora=LoraSpec(8, 8.0, 0.0, ("q_proj",)))
    for job_id, spec in (("second", _spec(make)), ("first", wider)):
        again = harness(blobs=h.blobs)
        again.start_job(job_id, make.dataset(LENGTHS), spec, checkpoint_blob=blob)
        again.run()
        failed = again.ended(job_id)
        assert isinstance(failed, JobFailed)
        assert failed.code == "bad_checkpoint"


class Store:
    """Blobs that can be away, broken, or held up."""

    def __init__(self, blobs):
        self.blobs = blobs
        self.error: Exception | None = None
        self.num_refused = 0
        self.gate = threading.Event()
        self.gate.set()

    def put(self, chunks):
        assert self.gate.wait(30)
        if self.error is not None:
            self.num_refused += 1
            raise self.error
        return self.blobs.put(chunks)


@pytest.fixture
def with_store(harness):
    def build(**changes):
        blobs = harness().blobs
        store = Store(blobs)
        return harness(blobs=blobs, put=store.put, **changes), store

    return build


@pytest.mark.parametrize("error", [Unavailable("the store does not answer"), OSError("disk full")])
def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_job(error, with_store, make, caplog):
    h, store = with_store()
    store.error = error
    h.start_job("job", make.dataset(LENGTHS), _spec(make))
    h.run(until=lambda: len(h.progress("job")) == 3)
    _run_until_refused(h, store, 1)
    store.error = None
    h.run()
    assert isinstance(h.ended("job"), JobSucceeded)
    assert 2 not in {m.step for m in h.checkpoints("job")}
    assert "goes on without a checkpoint" in caplog.text


def _run_until_refused(h, store, num_times):
    h.run(until=lambda: store.num_refused == num_times and not h.engine.awaits_background)


def test_a_finished_adapter_is_stored_as_soon_as_the_store_is_back(with_store, make):
    h, store = with_store()
    store.error = Unavailable("the store does not answer")
    h.start_job("job", make.dataset(LENGTHS), _spec(make, checkpoint_every=0))
    for attempt in range(1, 5):
        _run_until_refused(h, store, attempt)
        for _ in range(5):
            h.step()
        assert store.num_refused == attempt, "no attempt before its time"
        assert h.ended("job") is None
        assert not h.engine.awaits_background, "waiting for an attempt must not keep the loop busy"
        h.clock.now += 0.5 * 2 ** (attempt - 1) - 0.01
        h.step()
        assert store.num_refused == attempt
        h.clock.now += 0.02
    store.error = None
    h.run(until=lambda: h.ended("job") is not None)
    expected = h.trained("job")
    plain = type(h)(h.weights)
    plain.start_job("job", make.dataset(LENGTHS), _spec(make, checkpoint_every=0))
    plain.run()
    plain.engine.close()
    assert expected.digest == plain.trained("job").digest


def test_a_job_that_waits_for_the_store_holds_no_place_on_the_device(with_store, make):
    h, store = with_store()
    store.error = Unavailable("the store does not answer")
    h.start_job("job", make.dataset(LENGTHS), _spec(make, checkpoint_every=0))
    _run_until_refused(h, store, 1)
    h.step()
    assert h.scheduler.num_adapters_on_device == 0
    assert h.engine.heartbeat().gauges["num_finetune_jobs_running"] == 1


def test_an_adapter_that_can_never_be_stored_fails_its_job(with_store, make):
    h, store = with_store()
    store.error = OSError("disk full")
    h.start_job("job", make.dataset(LENGTHS), _spec(make, checkpoint_every=0))
    h.run()
    failed = h.ended("job")
    assert isinstance(failed, JobFailed)
    assert failed.code == "internal_error"
    assert "disk full" in failed.message


def test_checkpoints_arrive_in_order_and_newer_ones_replace_those_that_wait(with_store, make):
    h, store = with_store()
    store.gate.clear()
    h.start_job("job", make.dataset(LENGTHS), _spec(make, checkpoint_every=1))
    h.run(until=lambda: len(h.progress("job")) == 5)
    assert not h.checkpoints("job")
    store.gate.set()
    h.run()
    assert isinstance(h.ended("job"), JobSucceeded)
    steps = [m.step for m in h.checkpoints("job")]
    assert steps == sorted(steps)
    assert steps[0] == 1
    assert len(steps) < 5


def test_shutting_down_without_a_store_ends(with_store, make):
    h, store = with_store()
    h.start_job("running", make.dataset(LENGTHS), _spec(make, checkpoint_every=0, total_steps=10_000))
    h.start_job("done", make.dataset(LENGTHS), _spec(make, checkpoint_every=0, total_steps=1))
    store.error = Unavailable("the store does not answer")
    _run_until_refused(h, store, 1)
    h.run(until=lambda: h.progress("running"))
    assert [m for m in h.engine.shut_down() if isinstance(m, JobCheckpointed | JobSucceeded)] == []
    assert store.num_refused == 3, "each of the two was tried once more"


@pytest.mark.parametrize("pipeline_depth", [0, 1])
def test_a_cancelled_job_leaves_nothing_and_may_come_back(pipeline_depth, harness, make):
    h = harness(pipeline_depth=pipeline_depth)
    whole = harness()
    whole.start_job("job", make.dataset(LENGTHS), _spec(make))
    whole.run()
    for num_steps in range(1, 12):
        h.start_job("job", make.dataset(LENGTHS), _spec(make), lease_epoch=num_steps)
        h.run(until=lambda: h.engine.heartbeat().gauges["num_finetune_jobs_running"] == 1)
        for _ in range(num_steps):
            h.step()
        h.engine.handle(CancelJob("job"))
        told = len(h.messages)
        h.step()
        new = [m for m in h.messages[told:] if getattr(m, "job_id", None) == "job"]
        assert new == [JobStopped("job", num_steps)]
        h.scheduler.check_invariants()
    h.run()
    assert h.scheduler.kv_usage == 0
    assert h.scheduler.num_adapters_on_device == 0
    h.messages.clear()
    h.start_job("job", make.dataset(LENGTHS), _spec(make))
    h.run()
    assert h.losses("job") == pytest.approx(whole.losses("job"), abs=1e-6)


def test_a_job_cancelled_while_its_adapter_is_stored_is_stopped_and_nothing_else(with_store, make):
    h, store = with_store()
    store.gate.clear()
    h.start_job("job", make.dataset(LENGTHS), _spec(make, checkpoint_every=0))
    h.run(until=lambda: len(h.progress("job")) == 6)
    h.engine.handle(CancelJob("job"))
    store.gate.set()
    h.run()
    assert isinstance(h.ended("job"), JobStopped)


def test_the_flight_record_names_everything_in_flight_and_about_to_be(harness, make):
    h = harness(pipeline_depth=1)
    h.generate("short", make.prompt(5), max_tokens=1)
    h.step()
    assert h.records[-1] == ["short"]
    h.generate("next", make.prompt(6), max_tokens=1)
    h.step()
    assert h.records[-1] == ["next", "short"], "the plan before may still be running"
    h.generate("last", make.prompt(7), max_tokens=1)
    h.step()
    assert h.records[-1] == ["last", "next"]
    h.run()


def test_without_a_pipeline_the_flight_record_names_the_plan_alone(harness, make):
    h = harness()
    for name in ("first", "second"):
        h.generate(name, make.prompt(5), max_tokens=1)
        h.run()
        assert h.records[-1] == [name]


def test_a_finished_job_writes_nothing_to_the_place_that_it_gives_up(harness, make, monkeypatch):
    h = harness()
    pager = h.engine._pager
    written, refresh = [], pager.refresh
    monkeypatch.setattr(pager, "refresh", lambda key, weights: written.append(key) or refresh(key, weights))
    h.start_job("job", make.dataset(LENGTHS), _spec(make, total_steps=3))
    h.run()
    assert isinstance(h.ended("job"), JobSucceeded)
    assert written == ["job:job"] * 2


def test_the_last_messages_are_there_while_a_thread_still_waits_for_the_store(harness, make):
    held, reading = threading.Event(), threading.Semaphore(0)

    def read(blob):
        if blob in adapter_blobs:
            reading.release()
            held.wait(30)
        return h.blobs.read(blob)

    h = harness(read=read)
    ref = h.store(make.adapter(1))
    adapter_blobs = {ref.config_blob}
    h.start_job("job", make.dataset(LENGTHS), _spec(make, checkpoint_every=0))
    h.run(until=lambda: len(h.progress("job")) == 2)
    h.generate("request", make.prompt(4), adapter=ref)
    h.step()
    assert reading.acquire(timeout=30)
    last = h.engine.shut_down()
    assert not held.is_set()
    assert [m.job_id for m in last if isinstance(m, JobCheckpointed)] == ["job"]
    held.set()


EXIT_OUT_OF_A_THREAD = """
import runpy, threading
from concurrent.futures import ThreadPoolExecutor
from weft_server.engine import process

def main():
    ThreadPoolExecutor().submit(threading.Event().wait)
    raise RuntimeError("out of main")

process.main = main
runpy.run_module("weft_server.engine", run_name="__main__")
"""


def test_an_error_out_of_main_ends_the_process_whatever_its_threads_wait_for():
    command = [sys.executable, "-c", EXIT_OUT_OF_A_THREAD]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "RuntimeError: out of main" in ended.stderr
