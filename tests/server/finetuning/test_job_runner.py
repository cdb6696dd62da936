"""Jobs through crashes: of the engine, of the server, of the store; and shared between servers."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from safetensors.numpy import load

from weft_server import protocol
from weft_server.errors import InvalidRequest
from weft_server.service.hyperparameters import HyperparameterRequest, LoraRequest
from weft_server.service.job_records import Job
from weft_server.service.job_table import JobTable
from weft_server.service.job_updates import JobUpdate
from weft_server.service.jobs import NewJob
from weft_server.store.base import BlobMissing, StoreUnavailable, Update


class Records:
    """A real record store with a clock that can be set forward and a connection that can be cut."""

    def __init__(self, records: Any) -> None:
        self._records = records
        self.offset_s = 0.0
        self.is_away = False
        self.num_refused = 0

    def now(self) -> float:
        self._check()
        return float(self._records.now()) + self.offset_s

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._records, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._check()
            return method(*args, **kwargs)

        return call

    def _check(self) -> None:
        if self.is_away:
            self.num_refused += 1
            raise StoreUnavailable("the store is away")


async def submit(kit: Any, server: Any, *, lines: int = 4, model: str | None = None, **changes: Any) -> Job:
    file = await server.files.upload(
        "acme", filename="t.jsonl", purpose="fine-tune", content=io.BytesIO(kit.chat_lines(lines))
    )
    request = NewJob(model=model or kit.base, training_file=file.id, **changes)
    return await server.jobs.create("acme", request)


async def started(kit: Any, server: Any, job: Job, times: int = 1) -> protocol.StartJob:
    """Wait until the engine was given the job so often; returns the latest time."""

    def count() -> int:
        return sum(message.job_id == job.id for message in server.engine.started)

    await kit.until(lambda: count() >= times)
    assert count() == times
    return server.engine.run_of(job.id)


async def status(kit: Any, server: Any, job: Job, expected: str) -> Job:
    async def is_expected() -> bool:
        return bool((await server.jobs.get("acme", job.id)).status == expected)

    await kit.until(is_expected)
    return await server.jobs.get("acme", job.id)


async def texts(server: Any, job: Job) -> list[str]:
    page = await server.jobs.events("acme", job.id, limit=1000)
    return [event.value["message"] for event in reversed(page.items)]


def checkpoint(kit: Any, start: protocol.StartJob, step: int) -> protocol.JobCheckpointed:
    blob = kit.store.blobs.put([f"checkpoint {start.job_id} {step}".encode()])
    return protocol.JobCheckpointed(start.job_id, start.lease_epoch, step, blob)


def success(kit: Any, start: protocol.StartJob, weights: bytes = b"trained") -> protocol.JobSucceeded:
    config = kit.store.blobs.put([json.dumps({"r": 16, "lora_alpha": 32, "lora_dropout": 0.1}).encode()])
    adapter = protocol.AdapterRef(f"digest-{weights!r}", config, kit.store.blobs.put([weights]), len(weights))
    return protocol.JobSucceeded(
        start.job_id, start.lease_epoch, start.spec.total_steps, 99, adapter, 16, ["q_proj", "v_proj"], 10
    )


def is_kept(kit: Any, blob: str) -> bool:
    try:
        kit.store.blobs.size(blob)
    except BlobMissing:
        return False
    return True


# ---------------------------------------------------------------- the ordinary life


def test_the_engine_gets_the_tokenized_file(kit: Any) -> None:
    async def work() -> None:
        server = kit.server()
        job = await submit(kit, server, lines=5)
        start = await started(kit, server, job)
        arrays = load(kit.store.blobs.read_bytes(start.dataset_blob))
        assert arrays["lines"].tolist() == [1, 2, 3, 4, 5]
        assert (start.tenant, start.lease_epoch, start.checkpoint_blob, start.base_adapter) == (
            "acme",
            1,
            None,
            None,
        )
        await server.jobs.aclose()

    kit.run(work())


def test_success_publishes_the_adapter_and_lets_the_jobs_blobs_go(kit: Any) -> None:
    async def work() -> None:
        server = kit.server()
        job = await submit(kit, server, adapter_name="mine")
        start = await started(kit, server, job)
        saved = checkpoint(kit, start, 2)
        done = success(kit, start)
        await server.engine.say(kit.progress(start, 1), saved, done)
        job = await status(kit, server, job, "succeeded")
        assert (job.fine_tuned_model, job.trained_tokens) == ("mine", 99)
        adapter = await server.adapters.get("acme", "mine")
        assert (adapter.newest.number, adapter.newest.job_id) == (1, job.id)
        assert adapter.newest.ref == done.adapter
        # The store drops unlinked blobs once the change is visible.
        await kit.until(lambda: not is_kept(kit, start.dataset_blob) and not is_kept(kit, saved.blob))
        assert is_kept(kit, done.adapter.weights_blob)
        counted = 'weft_finetune_jobs_total{model_name="tiny-base",status="succeeded",tenant="acme"} 1.0'
        await kit.until(lambda: counted in server.metrics.render().decode())
        await server.jobs.aclose()

    kit.run(work())


def test_a_name_that_exists_gets_a_new_version_and_the_suffix_is_said_to_be_unused(kit: Any) -> None:
    async def work() -> None:
        server = kit.server()
        for number, weights in enumerate((b"one", b"two"), start=1):
            job = await submit(kit, server, adapter_name="mine", suffix="unused")
            await server.engine.say(success(kit, await started(kit, server, job), weights))
            await status(kit, server, job, "succeeded")
            assert (await server.adapters.get("acme", "mine")).newest.number == number
            assert "The suffix is not used: weft.adapter_name names the adapter 'mine'" in await texts(
                server, job
            )
        await server.jobs.aclose()

    kit.run(work())


def test_a_new_checkpoint_replaces_the_old_one(kit: Any) -> None:
    async def work() -> None:
        server = kit.server()
        job = await submit(kit, server)
        start = await started(kit, server, job)
        first, second = checkpoint(kit, start, 1), checkpoint(kit, start, 2)
        await server.engine.say(kit.progress(start, 1), first, kit.progress(start, 2), second)

        async def is_saved() -> bool:
            return bool((await server.jobs.get("acme", job.id)).checkpoint_step == 2)

        await kit.until(is_saved)
        await kit.until(lambda: not is_kept(kit, first.blob))
        assert is_kept(kit, second.blob)
        await server.jobs.aclose()

    kit.run(work())


def test_a_job_that_fails_in_the_engine_fails_alone_with_its_reason(kit: Any) -> None:
    async def work() -> None:
        server = kit.server()
        job, other = await submit(kit, server), await submit(kit, server)
        start = await started(kit, server, job)
        await started(kit, server, other)
        message = "The loss is NaN at step 3, example of line 2."
        await server.engine.say(protocol.JobFailed(job.id, start.lease_epoch, "nan_loss", message))
        job = await status(kit, server, job, "failed")
        assert job.error is not None
        assert (job.error.code, job.error.message, job.error.param) == ("nan_loss", message, None)
        assert (await server.jobs.get("acme", other.id)).status == "queued"
        await server.jobs.aclose()

    kit.run(work())


def test_a_job_continues_an_adapter_and_takes_its_shape(kit: Any) -> None:
    async def work() -> None:
        server = kit.server()
        config = json.dumps({"r": 8, "lora_alpha": 24, "lora_dropout": 0.25, "use_rslora": True}).encode()
        await server.adapters.upload("acme", "start", io.BytesIO(config), io.BytesIO(b"weights"))
        adapter = await server.adapters.get("acme", "start")
        job = await submit(kit, server, model="start@1")
        await server.adapters.delete("acme", "start")
        start = await started(kit, server, job)
        assert start.base_adapter == adapter.newest.ref
        assert start.spec.lora == protocol.LoraSpec(8, 24.0, 0.25, ("q_proj", "v_proj"), use_rslora=True)
        assert job.adapter_name == f"ft-{job.id}"
        await server.jobs.aclose()

    kit.run(work())


def test_a_shape_that_contradicts_the_continued_adapter_is_refused(kit: Any) -> None:
    async def work() -> None:
        server = kit.server()
        config = json.dumps({"r": 8, "lora_alpha": 16}).encode()
        await server.adapters.upload("acme", "start", io.BytesIO(config), io.BytesIO(b"weights"))
        with pytest.raises(InvalidRequest, match=r"weft\.lora\.r is 16"):
            await submit(
                kit, server, model="start", hyperparameters=HyperparameterRequest(lora=LoraRequest(rank=16))
            )
        await server.jobs.aclose()

    kit.run(work())


def test_a_cancelled_job_takes_no_more_news(kit: Any) -> None:
    async def work() -> None:
        server = kit.server()
        job = await submit(kit, server)
        start = await started(kit, server, job)
        await server.jobs.cancel("acme", job.id)
        assert server.engine.cancelled == [job.id]
        await server.engine.say(
            kit.progress(start, 1), success(kit, start), protocol.JobStopped(job.id, start.lease_epoch)
        )
        await server.jobs.tick()
        assert (await server.jobs.get("acme", job.id)).status == "cancelled"
        assert await server.adapters.list("acme") == []
        assert not is_kept(kit, start.dataset_blob)
        await server.jobs.aclose()

    kit.run(work())


# ---------------------------------------------------------------- engine death


def test_after_an_engine_restart_a_job_goes_on_from_its_checkpoint_under_a_new_epoch(kit: Any) -> None:
    async def work() -> None:
        server = kit.server()
        job = await submit(kit, server)
        first = await started(kit, server, job)
        saved = checkpoint(kit, first, 2)
        await server.engine.say(kit.progress(first, 1), kit.progress(first, 2), saved, kit.progress(first, 3))
        await server.engine.restart()
        second = await started(kit, server, job, times=2)
        assert (second.lease_epoch, second.checkpoint_blob) == (2, saved.blob)
        assert second.dataset_blob == first.dataset_blob
        # The dead engine's epoch is fenced off; the new one repeats step 3, which is not reported twice.
        await server.engine.say(protocol.JobFailed(job.id, 1, "late", "from the dead engine"))
        await server.engine.say(kit.progress(second, 3), kit.progress(second, 4), success(kit, second))
        await status(kit, server, job, "succeeded")
        messages = await texts(server, job)
        assert "The engine restarted; continuing from step 2" in messages
        for step in (1, 2, 3, 4):
            assert sum(text.startswith(f"Step {step}/") for text in messages) == 2
        await server.jobs.aclose()

    kit.run(work())


def test_a_job_that_kills_engines_fails_and_the_others_go_on(kit: Any) -> None:
    async def work() -> None:
        server = kit.server()
        poison, other = await submit(kit, server), await submit(kit, server)
        for job in (poison, other):
            await started(kit, server, job)
        await server.engine.restart(poison.id)
        poison = await status(kit, server, poison, "failed")
        assert poison.error is not None
        assert poison.error.code == "engine_crashed"
        await started(kit, server, other, times=2)
        await started(kit, server, poison, times=1)
        await server.jobs.aclose()

    kit.run(work())


def test_a_job_outlives_any_number_of_engines_that_it_did_not_kill(kit: Any) -> None:
    async def work() -> None:
        server = kit.server()
        job = await submit(kit, server)
        for times in range(1, 5):
            start = await started(kit, server, job, times)
            assert start.lease_epoch == times
            await server.engine.restart()
        await started(kit, server, job, times=5)
        await server.jobs.aclose()

    kit.run(work())


def test_a_job_submitted_while_the_engine_is_away_starts_when_it_is_back(kit: Any) -> None:
    async def work() -> None:
        server = kit.server()
        server.engine.ready = False
        job = await submit(kit, server)
        await status(kit, server, job, "queued")
        await server.jobs.tick()
        assert server.engine.started == []
        await server.engine.restart()
        await started(kit, server, job)
        await server.jobs.aclose()

    kit.run(work())


# ---------------------------------------------------------------- server death


def test_a_restarted_server_goes_on_from_the_checkpoint_without_tokenizing_again(kit: Any) -> None:
    async def work() -> None:
        crashed = kit.server()
        job = await submit(kit, crashed)
        first = await started(kit, crashed, job)
        saved = checkpoint(kit, first, 2)
        await crashed.engine.say(kit.progress(first, 1), kit.progress(first, 2), saved)

        async def is_saved() -> bool:
            return bool((await crashed.jobs.get("acme", job.id)).checkpoint_step == 2)

        await kit.until(is_saved)
        server = kit.server()
        await server.engine.restart()
        second = await started(kit, server, job)
        assert (second.dataset_blob, second.checkpoint_blob) == (first.dataset_blob, saved.blob)
        assert second.lease_epoch == 2
        assert "The server restarted; continuing from step 2" in await texts(server, job)
        # What the dead server would still do is fenced off.
        await crashed.engine.say(success(kit, first, b"stale"))
        await server.engine.say(success(kit, second, b"fresh"))
        await status(kit, server, job, "succeeded")
        (adapter,) = await server.adapters.list("acme")
        assert [version.ref.digest for version in adapter.versions] == ["digest-b'fresh'"]
        for closed in (crashed, server):
            await closed.jobs.aclose()

    kit.run(work())


def test_a_job_whose_file_was_not_read_yet_is_read_by_the_restarted_server(kit: Any) -> None:
    async def work() -> None:
        records = Records(kit.store.records)
        crashed = kit.server(records=records)
        job = await submit(kit, crashed)
        records.is_away = True
        assert kit.store.records.get("job", "acme", job.id).value["status"] == "validating_files"
        server = kit.server()
        await server.engine.restart()
        await started(kit, server, job)
        records.is_away = False
        for closed in (crashed, server):
            await closed.jobs.aclose()
        assert crashed.engine.started == []

    kit.run(work())


def test_jobs_of_another_base_model_wait_for_it(kit: Any) -> None:
    async def work() -> None:
        crashed = kit.server()
        job = await submit(kit, crashed)
        await started(kit, crashed, job)
        await crashed.jobs.aclose()
        server = kit.server()
        server.engine.info = replace(kit.info, base_fingerprint="base-2")
        await server.engine.restart()
        await server.jobs.tick()
        assert server.engine.started == []
        server.engine.info = kit.info
        await server.jobs.tick()
        await started(kit, server, job)
        await server.jobs.aclose()

    kit.run(work())


# ---------------------------------------------------------------- several servers on one store


def test_another_server_takes_a_job_over_when_its_lease_has_lapsed(kit: Any) -> None:
    async def work() -> None:
        clock = Records(kit.store.records)
        silent = kit.server(exclusive_store=False)
        heir = kit.server(exclusive_store=False, records=clock)
        job = await submit(kit, silent)
        first = await started(kit, silent, job)
        await heir.jobs.tick()
        assert heir.engine.started == []
        clock.offset_s = 21.0
        await heir.jobs.tick()
        second = await started(kit, heir, job)
        assert (first.lease_epoch, second.lease_epoch) == (1, 2)
        # The first comes back: its news are not taken, and it stops its engine's work.
        await silent.engine.say(kit.progress(first, 1))
        await silent.jobs.tick()
        assert silent.engine.cancelled == [job.id]
        assert (await heir.jobs.get("acme", job.id)).status == "queued"
        await heir.engine.say(success(kit, second))
        await status(kit, heir, job, "succeeded")
        for server in (silent, heir):
            await server.jobs.aclose()

    kit.run(work())


@pytest.mark.redis
def test_servers_that_share_a_redis_hand_a_job_over(redis_kit: Any) -> None:
    kit = redis_kit

    async def work() -> None:
        clock = Records(kit.store.records)
        silent = kit.server(exclusive_store=False)
        heir = kit.server(exclusive_store=False, records=clock)
        job = await submit(kit, silent, adapter_name="mine")
        first = await started(kit, silent, job)
        saved = checkpoint(kit, first, 2)
        await silent.engine.say(kit.progress(first, 2), saved)

        async def is_saved() -> bool:
            return bool((await heir.jobs.get("acme", job.id)).checkpoint_step == 2)

        await kit.until(is_saved)
        clock.offset_s = 21.0
        await heir.jobs.tick()
        second = await started(kit, heir, job)
        assert (second.lease_epoch, second.checkpoint_blob) == (2, saved.blob)
        await silent.engine.say(success(kit, first, b"stale"))
        await heir.engine.say(success(kit, second, b"fresh"))
        await status(kit, silent, job, "succeeded")
        (adapter,) = await silent.adapters.list("acme")
        assert [version.ref.digest for version in adapter.versions] == ["digest-b'fresh'"]
        for server in (silent, heir):
            await server.jobs.aclose()

    kit.run(work())


def test_an_owner_that_ticks_keeps_its_jobs(kit: Any) -> None:
    async def work() -> None:
        clock = Records(kit.store.records)
        owner, rival = (kit.server(exclusive_store=False, records=clock) for _ in range(2))
        job = await submit(kit, owner)
        start = await started(kit, owner, job)
        for _ in range(10):
            clock.offset_s += 15.0
            await owner.jobs.tick()
            await rival.jobs.tick()
        assert rival.engine.started == []
        assert owner.engine.started == [start]
        for server in (owner, rival):
            await server.jobs.aclose()

    kit.run(work())


def test_a_server_that_closes_hands_its_jobs_over_at_once(kit: Any) -> None:
    async def work() -> None:
        leaving, heir = (kit.server(exclusive_store=False) for _ in range(2))
        job = await submit(kit, leaving)
        start = await started(kit, leaving, job)
        saved = checkpoint(kit, start, 1)
        await leaving.engine.say(saved)
        await leaving.jobs.aclose()
        await heir.jobs.tick()
        assert (await started(kit, heir, job)).checkpoint_blob == saved.blob
        await heir.jobs.aclose()

    kit.run(work())


def test_a_job_cancelled_through_another_server_leaves_its_owners_engine(kit: Any) -> None:
    async def work() -> None:
        owner, other = (kit.server(exclusive_store=False) for _ in range(2))
        job = await submit(kit, owner)
        await started(kit, owner, job)
        await other.jobs.cancel("acme", job.id)
        await owner.jobs.tick()
        assert owner.engine.cancelled == [job.id]
        for server in (owner, other):
            await server.jobs.aclose()

    kit.run(work())


# ---------------------------------------------------------------- the store away


def test_news_wait_for_a_store_that_is_away_and_nothing_is_lost(kit: Any) -> None:
    async def work() -> None:
        records = Records(kit.store.records)
        server = kit.server(records=records)
        job = await submit(kit, server)
        start = await started(kit, server, job)
        records.is_away = True
        await server.engine.say(kit.progress(start, 1), kit.progress(start, 2), success(kit, start))
        with pytest.raises(StoreUnavailable):
            await server.jobs.tick()
        with pytest.raises(StoreUnavailable):
            await server.jobs.get("acme", job.id)
        await kit.until(lambda: records.num_refused > 4)
        records.is_away = False
        await status(kit, server, job, "succeeded")
        messages = await texts(server, job)
        assert [text for text in messages if text.startswith("Step")] == [
            "Step 1/12: training loss=2.0000",
            "Step 1/12: training loss=2.0000",
            "Step 2/12: training loss=1.0000",
            "Step 2/12: training loss=1.0000",
        ]
        await server.jobs.aclose()

    kit.run(work())


def test_an_engine_that_comes_back_is_not_kept_waiting_by_a_store_that_is_away(kit: Any) -> None:
    async def work() -> None:
        records = Records(kit.store.records)
        server = kit.server(records=records)
        job = await submit(kit, server)
        await started(kit, server, job)
        records.is_away = True
        await asyncio.wait_for(server.engine.restart(), 1)
        await kit.until(lambda: records.num_refused > 1)
        records.is_away = False
        await started(kit, server, job, times=2)
        await server.jobs.aclose()

    kit.run(work())


class _Forgetful:
    """A record store that applies a change and then says that it is away, when told to."""

    def __init__(self, records: Any) -> None:
        self._records = records
        self.is_forgetful = False

    def apply(self, changes: Any) -> Any:
        result = self._records.apply(changes)
        if self.is_forgetful:
            self.is_forgetful = False
            raise StoreUnavailable("the answer was lost")
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._records, name)


def test_a_write_whose_answer_was_lost_is_not_made_twice(kit: Any) -> None:
    async def work() -> None:
        records = _Forgetful(kit.store.records)
        server = kit.server(records=records)
        job = await submit(kit, server, adapter_name="mine")
        start = await started(kit, server, job)
        records.is_forgetful = True
        await server.engine.say(kit.progress(start, 1))
        await kit.until(lambda: not records.is_forgetful)
        await server.engine.say(kit.progress(start, 2))

        async def has_step_2() -> bool:
            return bool((await server.jobs.get("acme", job.id)).step == 2)

        await kit.until(has_step_2)
        records.is_forgetful = True
        await server.engine.say(success(kit, start))
        await status(kit, server, job, "succeeded")
        await kit.until(lambda: not records.is_forgetful)
        await server.jobs.aclose()
        messages = await texts(server, job)
        assert sum(text.startswith("Step 1/") for text in messages) == 2
        assert messages.count("The job has successfully completed") == 1
        assert len((await server.adapters.get("acme", "mine")).versions) == 1

    kit.run(work())


class _Failing:
    """A record store that meets changes for which `is_refused` holds with an error nobody foresaw."""

    def __init__(self, records: Any) -> None:
        self._records = records
        self.is_refused: Callable[[Any], bool] = lambda _: False

    def apply(self, changes: Any) -> Any:
        if any(self.is_refused(change) for change in changes):
            raise LookupError("nobody foresaw this")
        return self._records.apply(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._records, name)


def test_no_news_of_a_job_are_lost_to_an_unforeseen_error_that_passes(kit: Any) -> None:
    async def work() -> None:
        records = _Failing(kit.store.records)
        server = kit.server(records=records)
        job = await submit(kit, server)
        start = await started(kit, server, job)
        failures = iter([True, False, True, True, False, True])
        records.is_refused = lambda change: isinstance(change, Update) and next(failures, False)
        await server.engine.say(kit.progress(start, 1), checkpoint(kit, start, 1), kit.progress(start, 2))
        await server.engine.say(success(kit, start))
        await status(kit, server, job, "succeeded")
        messages = await texts(server, job)
        assert [text for text in messages if text.startswith(("Step", "Checkpoint"))] == [
            "Step 1/12: training loss=2.0000",
            "Step 1/12: training loss=2.0000",
            "Checkpoint saved at step 1",
            "Step 2/12: training loss=1.0000",
            "Step 2/12: training loss=1.0000",
        ]
        await server.jobs.aclose()

    kit.run(work())


def test_a_job_whose_news_cannot_be_written_fails_alone(kit: Any) -> None:
    async def work() -> None:
        records = _Failing(kit.store.records)
        server = kit.server(records=records)
        unlucky, other = await submit(kit, server), await submit(kit, server)
        starts = [await started(kit, server, job) for job in (unlucky, other)]

        def is_refused(change: Any) -> bool:
            is_its = isinstance(change, Update) and change.record.id == unlucky.id
            return is_its and change.value["status"] == "running"

        records.is_refused = is_refused
        for start in starts:
            await server.engine.say(kit.progress(start, 1), success(kit, start))
        await status(kit, server, other, "succeeded")
        unlucky = await status(kit, server, unlucky, "failed")
        assert unlucky.error is not None
        assert unlucky.error.code == "internal_error"
        assert "LookupError: nobody foresaw this" in unlucky.error.message
        assert server.engine.cancelled == [unlucky.id]
        await server.jobs.aclose()

    kit.run(work())


def test_a_job_that_cannot_even_be_failed_is_taken_up_again(kit: Any) -> None:
    async def work() -> None:
        records = _Failing(kit.store.records)
        server = kit.server(records=records)
        job = await submit(kit, server)
        start = await started(kit, server, job)
        records.is_refused = lambda _: True
        await server.engine.say(kit.progress(start, 1))
        await kit.until(lambda: server.engine.cancelled == [job.id])
        records.is_refused = lambda _: False
        await server.jobs.tick()
        await server.engine.say(success(kit, await started(kit, server, job, times=2)))
        await status(kit, server, job, "succeeded")
        await server.jobs.aclose()

    kit.run(work())


def test_an_unforeseen_error_in_one_jobs_resumption_does_not_keep_others_from_theirs(kit: Any) -> None:
    async def work() -> None:
        records = _Failing(kit.store.records)
        server = kit.server(records=records)
        unlucky, other = await submit(kit, server), await submit(kit, server)
        for job in (unlucky, other):
            await started(kit, server, job)
        records.is_refused = lambda change: isinstance(change, Update) and change.record.id == unlucky.id
        await server.engine.restart()
        await started(kit, server, other, times=2)
        records.is_refused = lambda _: False
        await server.jobs.tick()
        await started(kit, server, unlucky, times=2)
        await server.jobs.aclose()

    kit.run(work())


def test_a_file_that_cannot_be_read_for_a_reason_nobody_foresaw_fails_its_job(kit: Any) -> None:
    async def work() -> None:
        records = _Failing(kit.store.records)
        server = kit.server(records=records)
        records.is_refused = lambda change: isinstance(change, Update) and change.value["status"] == "queued"
        job = await status(kit, server, await submit(kit, server), "failed")
        assert job.error is not None
        assert job.error.code == "internal_error"
        await server.jobs.aclose()

    kit.run(work())


# ---------------------------------------------------------------- races


def test_a_change_that_lost_a_race_is_made_again_on_what_won(kit: Any) -> None:
    async def work() -> None:
        server = kit.server()
        job = await submit(kit, server)
        await started(kit, server, job)
        await server.jobs.aclose()
        table = JobTable(kit.store.records)
        seen: list[int] = []

        def count(current: Job) -> JobUpdate:
            seen.append(current.step)
            if len(seen) == 1:
                table.update("acme", job.id, lambda rival: JobUpdate(replace(rival, step=7)))
            return JobUpdate(replace(current, trained_tokens=current.step))

        updated = table.update("acme", job.id, count)
        assert updated is not None
        assert (updated.step, updated.trained_tokens) == (7, 7)
        assert seen == [0, 7]

    kit.run(work())
