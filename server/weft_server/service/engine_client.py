"""The API process's side of the engine: starts it, watches it, restarts it, and hides a restart from those it
can.

Implements `EnginePort` over two ZeroMQ sockets per engine process. When an engine dies, open generations are
submitted once more to its successor with the tokens already sent as their prefix; a request that was in the
plan at two deaths fails alone. Jobs are the job service's: it hears of every restart before anything is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import zmq
import zmq.asyncio

from weft_server import protocol
from weft_server.errors import ConfigError, Internal, InvalidRequest, Unavailable, WeftError
from weft_server.flight_recorder import read_flight_record
from weft_server.protocol import FromEngine, ToEngine
from weft_server.service.engine_port import JobHandler, JobMessage, RestartHandler
from weft_server.transport import decode, encode

log = logging.getLogger(__name__)

_HEARTBEAT_TIMEOUT_S = 30.0
_MAX_DEATHS = 5
_DEATH_WINDOW_S = 300.0
_SHUTDOWN_TIMEOUT_S = 30.0
_DRAIN_TIMEOUT_S = 2.0
_RETRY_AFTER_S = 2.0


@dataclass(frozen=True, slots=True)
class EngineLaunch:
    """How to start an engine process: `arguments(epoch, receive, send, flight_record)` is its command line's
    JSON."""

    config_json: Callable[[int, str, str, Path], str]
    run_dir: Path


@dataclass(slots=True)
class _Stream:
    """One open generation: the request as first sent, what came back, and how often it was in a fatal
    plan."""

    request: protocol.Generate
    queue: asyncio.Queue[protocol.ChoiceDelta | WeftError]
    sent: list[int] = field(default_factory=list)
    deaths: int = 0
    resubmissions: int = 0


@dataclass(slots=True)
class _Process:
    """One engine process and its sockets."""

    epoch: int
    process: asyncio.subprocess.Process
    to_engine: zmq.asyncio.Socket
    from_engine: zmq.asyncio.Socket
    flight_record: Path
    last_heard: float
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    def close(self) -> None:
        self.to_engine.close(linger=0)
        self.from_engine.close(linger=0)


class EngineObserver(Protocol):
    """Who counts what engines report; `metrics.Metrics` is one."""

    def engine_started(self) -> None:
        """One more engine became ready; its counters begin at zero."""

    def engine_lost(self) -> None:
        """The engine is gone."""

    def observe_heartbeat(self, heartbeat: protocol.Heartbeat) -> None:
        """A heartbeat arrived."""


class EngineStartFailed(WeftError):
    """The first engine could not start; the program ends with its message."""

    default_code = "engine_start_failed"


class EngineClient:
    """Owns the engine process. Create in a running event loop, then `start`; `stop` at the end."""

    def __init__(
        self,
        launch: EngineLaunch,
        *,
        observer: EngineObserver | None = None,
    ) -> None:
        self._launch = launch
        self._observer = observer
        self._context = zmq.asyncio.Context()
        # Not below the data directory: a socket's path may have 107 bytes at most.
        self._socket_dir = tempfile.TemporaryDirectory(prefix="weft-")
        self._current: _Process | None = None
        self._streams: dict[str, _Stream] = {}
        self._checks: dict[str, asyncio.Future[protocol.AdapterChecked]] = {}
        self._job_handlers: list[JobHandler] = []
        self._restart_handlers: list[RestartHandler] = []
        self._job_messages: asyncio.Queue[JobMessage] = asyncio.Queue()
        self._sending: set[asyncio.Future[None]] = set()
        self._deaths: deque[float] = deque()
        self._epoch = 0
        self._stopping = False
        self._given_up = False
        self._start_error: WeftError | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._info: protocol.EngineReady | None = None
        self._heartbeat: protocol.Heartbeat | None = None
        self._first_ready = asyncio.Event()
        self.num_restarts = 0

    # ------------------------------------------------------------ state

    @property
    def ready(self) -> bool:
        """Whether an engine is up and can serve."""
        return self._current is not None and self._current.ready.is_set()

    @property
    def why_not_ready(self) -> str | None:
        """One sentence for `/ready`; None when ready."""
        if self.ready:
            return None
        if self._given_up:
            return (
                f"the engine died {_MAX_DEATHS} times within {_DEATH_WINDOW_S:.0f} s; "
                "see the log and restart the server"
            )
        return (
            "the engine is loading the base model"
            if self._epoch <= 1
            else "the engine is restarting after a crash"
        )

    @property
    def info(self) -> protocol.EngineReady | None:
        """What the engine announced when it last became ready."""
        return self._info

    @property
    def heartbeat(self) -> protocol.Heartbeat | None:
        """The latest heartbeat."""
        return self._heartbeat

    @property
    def engine_pid(self) -> int | None:
        """Process id of the current engine."""
        return None if self._current is None else self._current.process.pid

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Start the engine and its supervision; returns at once (see `wait_ready`)."""
        self._tasks = [
            asyncio.create_task(self._supervise()),
            asyncio.create_task(self._deliver_job_messages()),
        ]

    async def wait_ready(self) -> protocol.EngineReady:
        """Wait for the first engine.

        Raises:
            EngineStartFailed: it could not start; the message says why.
        """
        await self._first_ready.wait()
        if self._info is None:
            raise self._start_error or EngineStartFailed("the engine did not start")
        return self._info

    async def stop(self) -> None:
        """Ask the engine to checkpoint its jobs and exit; kill it if it takes too long, or has none yet."""
        self._stopping = True
        process = self._current
        if process is not None and process.process.returncode is None:
            await self._end(process)
            # The supervisor takes what the engine had sent last: the checkpoints of its jobs.
            await asyncio.wait(self._tasks[:1], timeout=_DRAIN_TIMEOUT_S)
        while not self._job_messages.empty():
            await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if process is not None:
            process.close()
        self._context.term()
        self._socket_dir.cleanup()

    async def _end(self, process: _Process) -> None:
        if not process.ready.is_set():
            process.process.kill()
            await process.process.wait()
            return
        with contextlib.suppress(zmq.ZMQError):
            await process.to_engine.send_multipart(encode(protocol.Shutdown(), process.epoch))
        try:
            await asyncio.wait_for(process.process.wait(), _SHUTDOWN_TIMEOUT_S)
        except TimeoutError:
            log.warning("the engine did not exit within %.0f s; killing it", _SHUTDOWN_TIMEOUT_S)
            process.process.kill()
            await process.process.wait()

    # ------------------------------------------------------------ EnginePort

    async def generate(self, request: protocol.Generate) -> AsyncGenerator[protocol.ChoiceDelta, None]:
        """Stream one choice; see `EnginePort.generate`."""
        self._require_alive()
        stream = _Stream(request, asyncio.Queue())
        self._streams[request.request_id] = stream
        try:
            if self.ready:
                await self._send(request)
            while True:
                item = await stream.queue.get()
                if isinstance(item, WeftError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            if self._streams.pop(request.request_id, None) is not None and self.ready:
                with contextlib.suppress(WeftError, zmq.ZMQError):
                    await self._send(protocol.Abort(request.request_id))

    async def check_adapter(self, config_blob: str, weights_blob: str) -> protocol.AdapterChecked:
        """Validate uploaded blobs; see `EnginePort.check_adapter`."""
        self._require_ready()
        check_id = uuid4().hex
        future: asyncio.Future[protocol.AdapterChecked] = asyncio.get_running_loop().create_future()
        self._checks[check_id] = future
        try:
            await self._send(protocol.CheckAdapter(check_id, config_blob, weights_blob))
            return await future
        finally:
            self._checks.pop(check_id, None)

    async def start_job(self, message: protocol.StartJob) -> None:
        """Send a job; see `EnginePort.start_job`."""
        self._require_ready()
        await self._send(message)

    async def cancel_job(self, job_id: str) -> None:
        """Stop a job; an engine that is away has none."""
        if self.ready:
            await self._send(protocol.CancelJob(job_id))

    def set_tenant_weights(self, weights: Mapping[str, float]) -> None:
        """See `EnginePort.set_tenant_weights`; an engine that starts later is told at its start."""
        self._send_soon(protocol.SetTenantWeights(dict(weights)))

    def set_pinned_adapters(self, adapters: Sequence[protocol.AdapterRef]) -> None:
        """See `EnginePort.set_pinned_adapters`."""
        self._send_soon(protocol.SetPinnedAdapters(list(adapters)))

    def subscribe_jobs(self, handler: JobHandler) -> None:
        """See `EnginePort.subscribe_jobs`."""
        self._job_handlers.append(handler)

    def subscribe_restarts(self, handler: RestartHandler) -> None:
        """See `EnginePort.subscribe_restarts`."""
        self._restart_handlers.append(handler)

    def _require_alive(self) -> None:
        if self._given_up or self._stopping:
            raise Unavailable(self.why_not_ready or "the server is stopping", retry_after_s=_RETRY_AFTER_S)

    def _require_ready(self) -> None:
        self._require_alive()
        if not self.ready:
            raise Unavailable(self.why_not_ready or "the engine is away", retry_after_s=_RETRY_AFTER_S)

    def _send_soon(self, message: ToEngine) -> None:
        """Send what an engine that is away need not hear."""
        if self.ready:
            self._sending.add(task := asyncio.ensure_future(self._send(message)))
            task.add_done_callback(self._sending.discard)

    async def _send(self, message: ToEngine) -> None:
        process = self._current
        if process is None:
            raise Unavailable("the engine is away", retry_after_s=_RETRY_AFTER_S)
        await process.to_engine.send_multipart(encode(message, process.epoch))

    # ------------------------------------------------------------ supervision

    async def _supervise(self) -> None:
        suspects: set[str] = set()
        while not self._stopping:
            process = await self._spawn()
            self._current = process
            receiver = asyncio.create_task(self._receive(process, suspects))
            watcher = asyncio.create_task(self._watch(process))
            await process.process.wait()
            process.ready.clear()
            # What the engine had sent before it died is still in the socket.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained(process), 1.0)
            receiver.cancel()
            watcher.cancel()
            await asyncio.gather(receiver, watcher, return_exceptions=True)
            if self._is_stopping():
                return
            if self._info is None:
                self._start_error = self._start_error or EngineStartFailed(
                    f"the engine process ended with status {process.process.returncode} before it was ready"
                )
                self._first_ready.set()
                self._given_up = True
                return
            self._current = None
            suspects = self._bury(process)
            if self._given_up:
                return

    def _is_stopping(self) -> bool:
        return self._stopping

    async def _spawn(self) -> _Process:
        self._epoch += 1
        run_dir = self._launch.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        receive, send = (f"ipc://{self._socket_dir.name}/{name}-{self._epoch}" for name in ("to", "from"))
        to_engine, from_engine = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        for socket in (to_engine, from_engine):
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
        to_engine.bind(receive)
        from_engine.bind(send)
        flight_record = run_dir / "plan"
        # Should this engine die before it plans anything, the last one's record must not be read again.
        flight_record.unlink(missing_ok=True)
        config_json = self._launch.config_json(self._epoch, receive, send, flight_record)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "weft_server.engine", stdin=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None  # stays open: its end tells the engine that this process is gone
        with contextlib.suppress(ConnectionError):
            process.stdin.write(config_json.encode() + b"\n")
            await process.stdin.drain()
        log.info("engine %d started (pid %d)", self._epoch, process.pid)
        return _Process(self._epoch, process, to_engine, from_engine, flight_record, time.monotonic())

    def _bury(self, process: _Process) -> set[str]:
        """Count a death, settle what cannot go on, and return the ids that were in the dead engine's last
        plan."""
        suspects = read_flight_record(process.flight_record)
        process.close()
        self.num_restarts += 1
        if self._observer is not None:
            self._observer.engine_lost()
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths and self._deaths[0] < now - _DEATH_WINDOW_S:
            self._deaths.popleft()
        log.error(
            "engine %d died (status %s); in its plan: %d",
            process.epoch,
            process.process.returncode,
            len(suspects),
        )
        for future in self._checks.values():
            if not future.done():
                future.set_exception(
                    Unavailable("the engine restarted; try again", retry_after_s=_RETRY_AFTER_S)
                )
        for stream in self._streams.values():
            if stream.request.request_id in suspects:
                stream.deaths += 1
            if stream.deaths >= 2:
                stream.queue.put_nowait(
                    Internal("the engine crashed twice while it computed this request", code="engine_crashed")
                )
        if len(self._deaths) >= _MAX_DEATHS:
            self._given_up = True
            log.critical("the engine died %d times within %.0f s; giving up", _MAX_DEATHS, _DEATH_WINDOW_S)
            for stream in self._streams.values():
                stream.queue.put_nowait(Unavailable(self.why_not_ready or "", retry_after_s=_RETRY_AFTER_S))
        return suspects

    async def _watch(self, process: _Process) -> None:
        """Kill an engine whose heartbeat has stopped: a hung one is as good as dead."""
        while True:
            await asyncio.sleep(1.0)
            silence = time.monotonic() - process.last_heard
            if process.ready.is_set() and silence > _HEARTBEAT_TIMEOUT_S:
                log.error("engine %d has been silent for %.0f s; killing it", process.epoch, silence)
                process.process.kill()
                return

    # ------------------------------------------------------------ messages

    async def _receive(self, process: _Process, suspects: set[str]) -> None:
        while True:
            epoch, message = decode(await process.from_engine.recv_multipart())
            process.last_heard = time.monotonic()
            if epoch != process.epoch:
                continue
            if isinstance(message, protocol.EngineReady):
                await self._became_ready(process, message, suspects)
            else:
                self._dispatch(message)  # type: ignore[arg-type]

    async def _drained(self, process: _Process) -> None:
        while await process.from_engine.poll(50):
            await asyncio.sleep(0.01)

    async def _became_ready(self, process: _Process, info: protocol.EngineReady, suspects: set[str]) -> None:
        self._info = info
        if self._observer is not None:
            self._observer.engine_started()
        process.ready.set()
        for handler in self._restart_handlers:
            try:
                await handler(suspects)
            except Exception:
                log.exception("a restart handler failed")
        for stream in list(self._streams.values()):
            if stream.deaths < 2:
                stream.resubmissions += 1
                await self._send(replace(stream.request, generated=list(stream.sent)))
        self._first_ready.set()

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
        elif isinstance(message, protocol.EngineFailed):
            is_configuration = message.code == ConfigError.default_code
            kind = ConfigError if is_configuration else EngineStartFailed
            self._start_error = kind(message.message, code=message.code)
            log.error("the engine cannot start: %s", message.message)
        elif isinstance(message, JobMessage):
            self._job_messages.put_nowait(message)

    def _deliver(self, delta: protocol.ChoiceDelta) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is None:
            return
        stream.sent += delta.token_ids
        if delta.finish_reason is not None:
            del self._streams[delta.request_id]
        stream.queue.put_nowait(delta)

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
    kind = InvalidRequest if status < 500 else Internal
    error = kind(message, code=code, param=param)
    error.status = status
    return error
