"""The API process's side of the engine: generations, checks and jobs over whichever engine runs now.

Implements `EnginePort` and hides a restart from those it can: open generations are submitted once more to the
next engine with the tokens already sent as their prefix. Who was in a fatal plan comes back on trial
(`suspects.py`), and what is found to kill engines fails alone. Jobs are the job service's: it hears of every
restart before anything is sent. Processes are `engine_supervisor.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence, Set
from typing import Protocol
from uuid import uuid4

import zmq

from weft_server import protocol
from weft_server.errors import (
    DeadlineExceeded,
    EngineCrashed,
    Internal,
    InvalidRequest,
    Unavailable,
    WeftError,
)
from weft_server.protocol import FromEngine, ToEngine
from weft_server.service.engine_port import JobHandler, JobMessage, RestartHandler
from weft_server.service.engine_process import EngineLaunch
from weft_server.service.engine_supervisor import RETRY_AFTER_S, EngineSupervisor
from weft_server.service.open_stream import OpenStream
from weft_server.service.suspects import Suspects

log = logging.getLogger(__name__)

_CLEARING_TOKENS = 8
"""So many tokens behind those it had at a death, more than an engine has under way, a request is cleared."""
_CLEARING_STEPS = 2
"""So many optimizer steps behind the last that it had reported, a job is cleared: the report of one more may
have died with the engine, and then the next was fatal."""


class EngineObserver(Protocol):
    """Who counts what engines report; `metrics.Metrics` is one."""

    def engine_started(self) -> None:
        """One more engine became ready; its counters begin at zero."""

    def engine_lost(self) -> None:
        """The engine is gone."""

    def observe_heartbeat(self, heartbeat: protocol.Heartbeat) -> None:
        """A heartbeat arrived."""


class EngineClient:
    """Create in a running event loop, then `start`; `stop` at the end."""

    def __init__(
        self,
        launch: EngineLaunch,
        *,
        observer: EngineObserver | None = None,
    ) -> None:
        self._observer = observer
        self._supervisor = EngineSupervisor(launch, self)
        self._streams: dict[str, OpenStream] = {}
        self._heartbeat: protocol.Heartbeat | None = None
        self._checks: dict[str, asyncio.Future[protocol.AdapterChecked]] = {}
        self._job_handlers: list[JobHandler] = []
        self._restart_handlers: list[RestartHandler] = []
        self._job_messages: asyncio.Queue[JobMessage] = asyncio.Queue()
        self._suspects = Suspects()
        # The steps done of every job that is the engine's, and the jobs whose trial it has to wait for.
        self._job_steps: dict[str, int] = {}
        self._held_jobs: dict[str, protocol.StartJob] = {}
        self._guilty_jobs: set[str] = set()
        self._sending: set[asyncio.Future[None]] = set()
        self._deliverer: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ state

    @property
    def ready(self) -> bool:
        """Whether an engine is up and can serve."""
        return self._supervisor.ready

    @property
    def why_not_ready(self) -> str | None:
        """One sentence for `/ready`; None when ready."""
        return self._supervisor.why_not_ready

    @property
    def info(self) -> protocol.EngineReady | None:
        """What the engine announced when it last became ready."""
        return self._supervisor.info

    @property
    def heartbeat(self) -> protocol.Heartbeat | None:
        """The latest heartbeat."""
        return self._heartbeat

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Start the engine and its supervision; returns at once (see `wait_ready`)."""
        self._deliverer = asyncio.create_task(self._deliver_job_messages())
        self._supervisor.start()

    async def wait_ready(self) -> protocol.EngineReady:
        """Wait for the first engine.

        Raises:
            EngineStartFailed: it could not start; the message says why.
        """
        return await self._supervisor.wait_ready()

    async def stop(self) -> None:
        """Ask the engine to checkpoint its jobs and exit; kill it if it takes too long, or has none yet."""
        await self._supervisor.end_engine()
        while not self._job_messages.empty():
            await asyncio.sleep(0.01)
        if self._deliverer is not None:
            self._deliverer.cancel()
            await asyncio.gather(self._deliverer, return_exceptions=True)
        await self._supervisor.aclose()

    # ------------------------------------------------------------ EnginePort

    async def generate(self, request: protocol.Generate) -> AsyncGenerator[protocol.ChoiceDelta, None]:
        """Stream one choice; see `EnginePort.generate`."""
        self._require_alive()
        stream = OpenStream.begin(request)
        self._streams[request.request_id] = stream
        try:
            if self.ready:
                await self._supervisor.send(request)
            while True:
                item = await stream.next(lambda: self.ready)
                if isinstance(item, WeftError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._suspects.forget(request.request_id)
            if self._streams.pop(request.request_id, None) is not None and self.ready:
                with contextlib.suppress(WeftError, zmq.ZMQError):
                    await self._supervisor.send(protocol.Abort(request.request_id))

    async def check_adapter(self, config_blob: str, weights_blob: str) -> protocol.AdapterChecked:
        """Validate uploaded blobs; see `EnginePort.check_adapter`."""
        self._require_ready()
        check_id = uuid4().hex
        future: asyncio.Future[protocol.AdapterChecked] = asyncio.get_running_loop().create_future()
        self._checks[check_id] = future
        try:
            await self._supervisor.send(protocol.CheckAdapter(check_id, config_blob, weights_blob))
            return await future
        finally:
            self._checks.pop(check_id, None)

    async def start_job(self, message: protocol.StartJob) -> None:
        """Send a job; see `EnginePort.start_job`."""
        self._require_ready()
        self._job_steps.setdefault(message.job_id, 0)
        if self._suspects.must_wait(message.job_id):
            self._held_jobs[message.job_id] = message
        else:
            await self._supervisor.send(message)

    async def cancel_job(self, job_id: str) -> None:
        """Stop a job; an engine that is away has none."""
        self._forget_job(job_id)
        if self.ready:
            await self._supervisor.send(protocol.CancelJob(job_id))

    def set_tenant_weights(self, weights: Mapping[str, float]) -> None:
        """See `EnginePort.set_tenant_weights`; an engine that starts later is told at its start."""
        self._tell(protocol.SetTenantWeights(dict(weights)))

    def set_tenant_concurrency(self, max_concurrency: Mapping[str, int]) -> None:
        """See `EnginePort.set_tenant_concurrency`; an engine that starts later is told at its start."""
        self._tell(protocol.SetTenantConcurrency(dict(max_concurrency)))

    def set_pinned_adapters(self, adapters: Sequence[protocol.AdapterRef]) -> None:
        """See `EnginePort.set_pinned_adapters`."""
        self._tell(protocol.SetPinnedAdapters(list(adapters)))

    def _tell(self, message: ToEngine) -> None:
        """Send what an engine that is away need not hear."""
        if self.ready:
            self._sending.add(task := asyncio.ensure_future(self._supervisor.send(message)))
            task.add_done_callback(self._sending.discard)

    def subscribe_jobs(self, handler: JobHandler) -> None:
        """See `EnginePort.subscribe_jobs`."""
        self._job_handlers.append(handler)

    def subscribe_restarts(self, handler: RestartHandler) -> None:
        """See `EnginePort.subscribe_restarts`."""
        self._restart_handlers.append(handler)

    def _require_alive(self) -> None:
        if self._supervisor.given_up is not None or self._supervisor.is_stopping:
            raise Unavailable(self.why_not_ready or "the server is stopping", retry_after_s=RETRY_AFTER_S)

    def _require_ready(self) -> None:
        self._require_alive()
        if not self.ready:
            raise Unavailable(self.why_not_ready or "the engine is away", retry_after_s=RETRY_AFTER_S)

    # ------------------------------------------------------------ one engine after the other

    async def engine_became_ready(self) -> None:
        """See `EngineUser`: interrupted work goes on."""
        if self._observer is not None:
            self._observer.engine_started()
        # Whatever comes from now on sends itself.
        interrupted = list(self._streams.values())
        guilty, self._guilty_jobs = self._guilty_jobs, set()
        for handler in self._restart_handlers:
            try:
                await handler(guilty)
            except Exception:
                log.exception("a restart handler failed")
        for stream in interrupted:
            request_id = stream.request.request_id
            if request_id in self._streams and not self._suspects.must_wait(request_id):
                await self._supervisor.send(stream.resubmission())
        await self._admit_suspects()

    def engine_died(self, planned: set[str]) -> None:
        """See `EngineUser`: settle what cannot go on."""
        if self._observer is not None:
            self._observer.engine_lost()
        self._convict(planned)
        self._fail_checks("the engine restarted; try again")

    def engine_given_up(self, reason: str) -> None:
        """See `EngineUser`: fail what waits."""
        self._fail_checks(reason)
        for stream in self._streams.values():
            stream.queue.put_nowait(Unavailable(reason, retry_after_s=RETRY_AFTER_S))

    async def engine_said(self, message: FromEngine) -> None:
        """See `EngineUser`."""
        self._dispatch(message)
        await self._admit_suspects()

    def _fail_checks(self, reason: str) -> None:
        for future in self._checks.values():
            if not future.done():
                future.set_exception(Unavailable(reason, retry_after_s=RETRY_AFTER_S))

    def _convict(self, planned: Set[str]) -> None:
        """Suspect what was in the fatal plan, requests first; fail what is known to kill the engine."""
        goals = {
            request_id: len(stream.sent) + _CLEARING_TOKENS
            for request_id, stream in self._streams.items()
            if request_id in planned
        }
        goals |= {
            job_id: step + _CLEARING_STEPS for job_id, step in self._job_steps.items() if job_id in planned
        }
        guilty = self._suspects.engine_died(goals)
        self._held_jobs.clear()
        if guilty is None:
            return
        log.error("%s kills the engine and is not run again", guilty)
        stream = self._streams.pop(guilty, None)
        if stream is None:
            self._guilty_jobs.add(guilty)
        else:
            stream.queue.put_nowait(EngineCrashed("the engine crashed each time it computed this request"))

    async def _admit_suspects(self) -> None:
        """Give the engine the suspects whose trial begins."""
        if not self.ready:
            return
        for item_id in self._suspects.admit(time.monotonic()):
            stream, job = self._streams.get(item_id), self._held_jobs.pop(item_id, None)
            if stream is not None:
                await self._supervisor.send(stream.resubmission())
            elif job is not None:
                await self._supervisor.send(job)

    def _dispatch(self, message: FromEngine) -> None:
        if isinstance(message, protocol.StepOutput):
            for delta in message.deltas:
                self._deliver(delta)
        elif isinstance(message, protocol.Heartbeat):
            self._heartbeat = message
            if self._observer is not None:
                self._observer.observe_heartbeat(message)
        elif isinstance(message, protocol.RequestFailed):
            stream = self._streams.get(message.request_id)
            if stream is not None:
                stream.queue.put_nowait(_error(message.status, message.code, message.message))
        elif isinstance(message, protocol.AdapterChecked | protocol.CheckFailed):
            self._settle_check(message)
        elif isinstance(message, JobMessage):
            self._follow_job(message)
            self._job_messages.put_nowait(message)

    def _deliver(self, delta: protocol.ChoiceDelta) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is None:
            return
        stream.sent += delta.token_ids
        self._suspects.progressed(delta.request_id, len(stream.sent), time.monotonic())
        if delta.finish_reason is not None:
            del self._streams[delta.request_id]
            self._suspects.forget(delta.request_id)
        stream.queue.put_nowait(delta)

    def _follow_job(self, message: JobMessage) -> None:
        """A job that continues from a checkpoint repeats steps; they do not clear it."""
        if isinstance(message, protocol.JobProgress):
            if message.job_id in self._job_steps:
                self._job_steps[message.job_id] = max(message.step, self._job_steps[message.job_id])
            self._suspects.progressed(message.job_id, message.step, time.monotonic())
        elif not isinstance(message, protocol.JobCheckpointed):
            self._forget_job(message.job_id)

    def _forget_job(self, job_id: str) -> None:
        self._job_steps.pop(job_id, None)
        self._held_jobs.pop(job_id, None)
        self._suspects.forget(job_id)

    def _settle_check(self, message: protocol.AdapterChecked | protocol.CheckFailed) -> None:
        future = self._checks.get(message.check_id)
        if future is None or future.done():
            return
        if isinstance(message, protocol.AdapterChecked):
            future.set_result(message)
        else:
            future.set_exception(_error(message.status, message.code, message.message, message.param))

    async def _deliver_job_messages(self) -> None:
        while True:
            message = await self._job_messages.get()
            for handler in self._job_handlers:
                try:
                    await handler(message)
                except Exception:
                    log.exception("a job handler failed on %s", type(message).__name__)


def _error(status: int, code: str, message: str, param: str | None = None) -> WeftError:
    kind: type[WeftError] = InvalidRequest if status < 500 else Internal
    if status == DeadlineExceeded.status:
        kind = DeadlineExceeded
    error = kind(message, code=code, param=param)
    error.status = status
    return error
