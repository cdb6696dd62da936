"""Runs this server's jobs: holds leases, tokenizes files, sends them to the engine, writes what it reports.

A job is run by the one server that holds its lease. Each has a `_Run` here: an inbox of the engine's
messages and a task that writes them to the store, in order, however long the store is away. Messages of an
older epoch (an engine or owner that has been replaced) are dropped, and every write is a compare-and-set
that checks the lease. Knows nothing of HTTP; what a message does to a job is `job_updates.py`'s.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from weft_server import protocol
from weft_server.errors import WeftError
from weft_server.metrics import Metrics
from weft_server.service import hyperparameters, job_updates
from weft_server.service.adapter_versions import ADAPTER_KIND, version_counter
from weft_server.service.engine_port import EnginePort, JobMessage
from weft_server.service.job_records import Job, JobError, message_event
from weft_server.service.job_table import JobTable
from weft_server.service.job_updates import JobNews, JobUpdate
from weft_server.service.job_validation import read_training_file
from weft_server.service.job_writer import JobWriter, TimedChange, retrying
from weft_server.service.leases import DEFAULT_LEASE_S, needs_renewal, released, renewed, try_acquire
from weft_server.service.tokenizer import Tokenizer
from weft_server.store.base import BlobMissing, BlobStore, RecordStore, StoreUnavailable

MAX_CONCURRENT_VALIDATIONS = 2
_CLOSE_TIMEOUT_S = 5.0
_RETRY_DELAYS_S = (0.05, 0.2, 1.0)
"""Between attempts at a write that fails unexpectedly. A store that is away is waited for without end."""

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Run:
    """A job that this server runs. `abandoned` stops its tokenization and its writer.

    `is_sent` says that the engine has it, `is_interrupted` that the engine died and it needs a new epoch.
    """

    tenant: str
    job_id: str
    epoch: int
    is_sent: bool = False
    is_interrupted: bool = False
    abandoned: threading.Event = field(default_factory=threading.Event)
    inbox: asyncio.Queue[JobMessage] = field(default_factory=asyncio.Queue)
    writer: asyncio.Task[None] | None = None


class JobRunner:
    """The jobs of one server."""

    def __init__(
        self,
        records: RecordStore,
        blobs: BlobStore,
        engine: EnginePort,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        exclusive_store: bool,
        lease_s: float = DEFAULT_LEASE_S,
        published: Callable[[], None] | None = None,
    ) -> None:
        """Subscribes to the engine: construct it before the engine starts.

        Args:
            records, blobs: the stores.
            engine: runs the jobs.
            tokenizer: the base's.
            metrics: counts finished jobs and published adapters.
            exclusive_store: no other server can share the store, so leases of others are a dead process's.
            lease_s: how long a lease lasts without renewal; `tick` is due several times as often.
            published: called after a job has published an adapter.
        """
        self.owner = f"server-{secrets.token_hex(8)}"
        self._records = records
        self._blobs = blobs
        self._engine = engine
        self._tokenizer = tokenizer
        self._exclusive_store = exclusive_store
        self._lease_s = lease_s
        self._published = published
        self._jobs = JobTable(records)
        self._writer = JobWriter(records, metrics, self.owner)
        self._runs: dict[str, _Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()
        self._validations = asyncio.Semaphore(MAX_CONCURRENT_VALIDATIONS)
        self._is_closing = False
        engine.subscribe_jobs(self._receive)
        engine.subscribe_restarts(self._engine_restarted)

    # ------------------------------------------------------------ what the service calls

    def run_created(self, job: Job) -> None:
        """Run a job that was just stored with this server's lease. Returns at once."""
        self._spawn(self._run_created(job))

    async def stop(self, job_id: str) -> None:
        """Drop a finished job, here and in the engine. Another server's it is that server's to notice."""
        run = self._runs.get(job_id)
        if run is not None:
            await self._abandon(run)

    async def tick(self) -> None:
        """Renew leases, take over lapsed jobs, and send what could not be sent before.

        Raises:
            StoreUnavailable: the store does not answer; the next tick goes on.
        """
        async with self._lock:
            await self._reconcile()

    async def aclose(self) -> None:
        """Write what has arrived, stop everything, and release the leases. Close the engine before."""
        self._is_closing = True
        runs = list(self._runs.values())
        for run in runs:
            run.abandoned.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await asyncio.gather(*(_drained(run) for run in runs))
        for run in runs:
            with suppress(StoreUnavailable):
                await asyncio.to_thread(
                    self._jobs.update, run.tenant, run.job_id, self._writer.fenced(run.epoch, _release)
                )
            self._forget(run)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------ leases

    async def _run_created(self, job: Job) -> None:
        async with self._lock:
            if job.id not in self._runs and job.lease is not None:
                await self._begin(job, job.lease.epoch)

    async def _reconcile(self) -> None:
        unfinished = await asyncio.to_thread(self._jobs.unfinished)
        now = await asyncio.to_thread(self._records.now)
        for job in unfinished:
            try:
                await self._reconcile_job(job, now)
            except StoreUnavailable:
                raise
            except Exception:
                logger.exception("job %s is left to the next tick", job.id)
        known = {job.id for job in unfinished}
        for run in [run for run in self._runs.values() if run.job_id not in known]:
            current = await asyncio.to_thread(self._jobs.get, run.tenant, run.job_id)
            if current is None or current.is_final:
                await self._abandon(run)

    async def _reconcile_job(self, job: Job, now: float) -> None:
        run = self._runs.get(job.id)
        if run is None:
            await self._try_take_over(job, now)
        else:
            await self._keep(run, job, now)

    async def _keep(self, run: _Run, job: Job, now: float) -> None:
        lease = job.lease
        if lease is None or not lease.held_by(self.owner) or lease.epoch != run.epoch:
            logger.warning("job %s was taken over by another server", job.id)
            await self._abandon(run)
            return
        if needs_renewal(lease, now=now, duration_s=self._lease_s):
            renewal = renewed(lease, now=now, duration_s=self._lease_s)
            change = self._writer.fenced(
                run.epoch, lambda current, _: JobUpdate(replace(current, lease=renewal))
            )
            await asyncio.to_thread(self._jobs.update, run.tenant, run.job_id, change)
        if not run.is_sent:
            await self._send(run)

    async def _try_take_over(self, job: Job, now: float) -> None:
        info = self._engine.info
        if info is None or info.base_fingerprint != job.base_fingerprint:
            return
        lease = try_acquire(
            job.lease, self.owner, now=now, duration_s=self._lease_s, exclusive=self._exclusive_store
        )
        if lease is None:
            return

        def take(current: Job) -> JobUpdate | None:
            if current.is_final or current.lease != job.lease:
                return None
            taken = replace(current, lease=lease, pace=None)
            if current.status != "running":
                return JobUpdate(taken)
            text = f"The server restarted; continuing from step {current.checkpoint_step}"
            return JobUpdate(taken, (message_event(current, text, now=now, level="warn"),))

        taken = await asyncio.to_thread(self._jobs.update, job.tenant, job.id, take)
        if taken is not None:
            logger.info("running job %s (%s), epoch %d", job.id, job.status, lease.epoch)
            await self._begin(taken, lease.epoch)

    # ------------------------------------------------------------ tokenizing and sending

    async def _begin(self, job: Job, epoch: int) -> None:
        if self._is_closing:
            return
        run = _Run(job.tenant, job.id, epoch)
        self._runs[job.id] = run
        run.writer = self._spawn(self._write_messages(run))
        if job.dataset_blob is None:
            self._spawn(self._validate_surely(run, job))
        else:
            await self._send(run)

    async def _validate_surely(self, run: _Run, job: Job) -> None:
        try:
            await self._validate(run, job)
        except Exception as error:
            logger.exception("reading the file of job %s failed", job.id)
            await self._give_up(run, error)

    async def _validate(self, run: _Run, job: Job) -> None:
        async with self._validations:
            dataset = await retrying(
                lambda: read_training_file(self._blobs, self._tokenizer, job, cancelled=run.abandoned.is_set)
            )
        if dataset is None:
            return
        if isinstance(dataset, JobError):
            await self._fail(run, dataset)
            return
        spec = hyperparameters.resolve(
            job.hyperparameters, job_id=job.id, lora=job.lora, num_examples=dataset.num_examples
        )
        await self._persist(run, lambda job, now: job_updates.tokenized(job, dataset, spec, now=now))
        async with self._lock:
            await self._send(run)

    async def _send(self, run: _Run) -> None:
        """Start the job in the engine if it can be now; else a later tick or the engine's return does."""
        if run.is_sent or run.is_interrupted or run.abandoned.is_set() or not self._engine.ready:
            return
        job = await asyncio.to_thread(self._jobs.get, run.tenant, run.job_id)
        if job is None or job.is_final or job.spec is None or job.dataset_blob is None:
            return
        # Before it is sent, so that an engine dying meanwhile finds it among those to be resumed.
        run.is_sent = True
        try:
            await self._engine.start_job(
                protocol.StartJob(
                    job_id=job.id,
                    tenant=job.tenant,
                    spec=job.spec,
                    dataset_blob=job.dataset_blob,
                    lease_epoch=run.epoch,
                    base_adapter=job.base_adapter,
                    checkpoint_blob=job.checkpoint_blob,
                )
            )
        except WeftError as error:
            logger.info("sending job %s: %s", job.id, error.message)
            run.is_sent = False

    # ------------------------------------------------------------ the engine's side

    async def _receive(self, message: JobMessage) -> None:
        run = self._runs.get(message.job_id)
        if run is None or message.lease_epoch != run.epoch:
            logger.debug("dropped %s of job %s", type(message).__name__, message.job_id)
            return
        run.inbox.put_nowait(message)

    async def _engine_restarted(self, guilty: set[str]) -> None:
        """Returns at once: serving must not wait for a store that is away."""
        for run in self._runs.values():
            run.is_interrupted = run.is_interrupted or run.is_sent
            run.is_sent = False
        self._spawn(self._resume(frozenset(guilty)))

    async def _resume(self, guilty: frozenset[str]) -> None:
        async with self._lock:
            for run in [run for run in self._runs.values() if run.is_interrupted]:
                await _drained(run)
                if run.abandoned.is_set():
                    continue
                try:
                    await self._resume_run(run, is_guilty=run.job_id in guilty)
                except Exception:
                    logger.exception("job %s is left to the next tick", run.job_id)
                    self._forget(run)
            with suppress(StoreUnavailable):
                await self._reconcile()

    async def _resume_run(self, run: _Run, *, is_guilty: bool) -> None:
        updated = await self._persist(
            run, lambda job, now: job_updates.engine_restarted(job, is_guilty=is_guilty, now=now)
        )
        if updated is None or updated.is_final or updated.lease is None:
            self._forget(run)
        else:
            run.epoch = updated.lease.epoch
            run.is_interrupted = False

    async def _write_messages(self, run: _Run) -> None:
        while not run.abandoned.is_set() or not run.inbox.empty():
            batch = [await run.inbox.get()]
            while not run.inbox.empty():
                batch.append(run.inbox.get_nowait())
            try:
                for news in job_updates.merged(batch):
                    await self._write_surely(run, news)
            finally:
                for _ in batch:
                    run.inbox.task_done()

    async def _write_surely(self, run: _Run, news: JobNews) -> None:
        """Write one piece of news; what cannot be written fails this job alone, and no other news is lost."""
        for delay_s in _RETRY_DELAYS_S:
            try:
                await self._write(run, news)
                return
            except Exception:
                logger.exception("writing the progress of job %s failed; trying again", run.job_id)
            await asyncio.sleep(delay_s)
        try:
            await self._write(run, news)
        except Exception as error:
            logger.exception("writing the progress of job %s failed for good", run.job_id)
            await self._give_up(run, error)

    async def _give_up(self, run: _Run, error: Exception) -> None:
        text = f"The job could not be read or recorded ({type(error).__name__}: {error}); see the log."
        try:
            await self._fail(run, JobError("internal_error", text))
        except Exception:
            logger.exception("job %s is left to the next tick, from its last checkpoint", run.job_id)
        await self._abandon(run)

    async def _write(self, run: _Run, news: JobNews) -> None:
        match news:
            case list():
                await self._persist(run, lambda job, now: job_updates.progressed(job, news, now=now))
            case protocol.JobCheckpointed():
                try:
                    await self._persist(run, lambda job, now: job_updates.checkpointed(job, news, now=now))
                except BlobMissing:
                    logger.error("job %s: the checkpoint of step %d is gone", run.job_id, news.step)
            case protocol.JobSucceeded():
                await self._publish(run, news)
            case protocol.JobFailed():
                await self._fail(run, JobError(news.code, news.message, news.param))
            case protocol.JobStopped():
                logger.warning("job %s left the engine unasked; sending it again", run.job_id)
                run.is_sent = False

    async def _publish(self, run: _Run, message: protocol.JobSucceeded) -> None:
        job = await retrying(lambda: self._jobs.get(run.tenant, run.job_id))
        assert job is not None, "jobs are never deleted"
        name = job.adapter_name
        number = await retrying(lambda: self._records.next_number(version_counter(run.tenant, name)))

        def change(job: Job, now: float) -> JobUpdate | None:
            current = self._records.get(ADAPTER_KIND, job.tenant, name)
            return job_updates.succeeded(job, message, current, number, now=now)

        try:
            await self._persist(run, change)
            if self._published is not None:
                self._published()
        except BlobMissing:
            await self._fail(
                run, JobError("adapter_missing", "The trained adapter's stored bytes are missing or damaged.")
            )
        self._forget(run)

    async def _fail(self, run: _Run, error: JobError) -> None:
        await self._persist(run, lambda job, now: job_updates.failed(job, error, now=now))
        self._forget(run)

    async def _persist(self, run: _Run, change: TimedChange) -> Job | None:
        return await self._writer.persist(run.tenant, run.job_id, run.epoch, change)

    # ------------------------------------------------------------ tasks

    async def _abandon(self, run: _Run) -> None:
        """Stop running a job that is finished or another server's."""
        self._forget(run)
        if run.is_sent:
            try:
                await self._engine.cancel_job(run.job_id)
            except WeftError as error:
                logger.info("cancelling job %s: %s", run.job_id, error.message)

    def _forget(self, run: _Run) -> None:
        run.abandoned.set()
        if self._runs.get(run.job_id) is run:
            del self._runs[run.job_id]
        if run.writer is not None and run.writer is not asyncio.current_task():
            run.writer.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a job task failed", exc_info=error)


async def _drained(run: _Run) -> None:
    """Wait until every message has been written, or its writer was stopped."""
    drained = asyncio.ensure_future(run.inbox.join())
    waited_for = {drained} if run.writer is None else {drained, run.writer}
    try:
        await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
    finally:
        drained.cancel()


def _release(job: Job, _now: float) -> JobUpdate | None:
    return None if job.lease is None or job.is_final else JobUpdate(replace(job, lease=released(job.lease)))
