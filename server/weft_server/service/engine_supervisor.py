"""Keeps an engine running: starts it, listens, watches its heartbeat, and starts another when it has died.

Owns the processes one after the other and the decision to give up. What messages mean, and what becomes of
the work of a dead engine, is its user's (`engine_client.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Protocol

import zmq
import zmq.asyncio

from weft_server import protocol
from weft_server.errors import ConfigError, Unavailable, WeftError
from weft_server.flight_recorder import read_flight_record
from weft_server.protocol import FromEngine, ToEngine
from weft_server.service.engine_process import EngineLaunch, EngineProcess, spawn
from weft_server.transport import decode

log = logging.getLogger(__name__)

RETRY_AFTER_S = 2.0
_MAX_DEATHS = 5
_DEATH_WINDOW_S = 300.0
_RESPAWN_DELAY_S = 1.0
_DRAIN_TIMEOUT_S = 2.0


class EngineUser(Protocol):
    """Who works with the engines."""

    async def engine_became_ready(self) -> None:
        """One more engine is ready; messages may be sent from now on."""

    async def engine_said(self, message: FromEngine) -> None:
        """The engine that runs now sent a message."""

    def engine_died(self, planned: set[str]) -> None:
        """The engine is gone; `planned` are the ids in its last plan. Another follows, or giving up."""

    def engine_given_up(self, reason: str) -> None:
        """No further engine will be started."""


class EngineStartFailed(WeftError):
    """The first engine could not start; the program ends with its message."""

    default_code = "engine_start_failed"


class EngineSupervisor:
    """Create in a running event loop, then `start`; `stop` at the end."""

    def __init__(self, launch: EngineLaunch, user: EngineUser) -> None:
        self._launch = launch
        self._user = user
        self._context = zmq.asyncio.Context()
        # Not below the data directory: a socket's path may have 107 bytes at most.
        self._socket_dir = tempfile.TemporaryDirectory(prefix="weft-")
        self._current: EngineProcess | None = None
        self._deaths: deque[float] = deque()
        self._epoch = 0
        self._start_error: WeftError | None = None
        self._task: asyncio.Task[None] | None = None
        self._first_ready = asyncio.Event()
        self.is_stopping = False
        self.given_up: str | None = None
        """Why no further engine is started; None while one is or may be."""
        self.info: protocol.EngineReady | None = None
        """What the engine announced when it last became ready."""

    @property
    def ready(self) -> bool:
        """Whether an engine is up and can serve."""
        return self._current is not None and self._current.ready.is_set()

    @property
    def why_not_ready(self) -> str | None:
        """One sentence for `/ready`; None when ready."""
        if self.ready:
            return None
        if self.given_up is not None:
            return self.given_up
        return (
            "the engine is loading the base model"
            if self._epoch <= 1
            else "the engine is restarting after a crash"
        )

    def start(self) -> None:
        """Start the engine and its supervision; returns at once (see `wait_ready`)."""
        self._task = asyncio.create_task(self._supervise())

    async def wait_ready(self) -> protocol.EngineReady:
        """Wait for the first engine.

        Raises:
            EngineStartFailed: it could not start; the message says why.
        """
        await self._first_ready.wait()
        if self.info is None:
            raise self._start_error or EngineStartFailed("the engine did not start")
        return self.info

    async def send(self, message: ToEngine) -> None:
        """Send to the engine that runs now.

        Raises:
            Unavailable: there is none.
        """
        process = self._current
        if process is None:
            raise Unavailable("the engine is away", retry_after_s=RETRY_AFTER_S)
        await process.send(message)

    async def end_engine(self) -> None:
        """Start no other engine; ask this one to checkpoint its jobs and exit; take what it sends last."""
        self.is_stopping = True
        process = self._current
        if process is not None and process.process.returncode is None:
            await process.end()
            if self._task is not None:
                await asyncio.wait({self._task}, timeout=_DRAIN_TIMEOUT_S)

    async def aclose(self) -> None:
        """Stop supervising and free the sockets; call `end_engine` before."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._current is not None:
            self._current.close()
        self._context.term()
        self._socket_dir.cleanup()

    # ------------------------------------------------------------ one engine after the other

    async def _supervise(self) -> None:
        try:
            while not self.is_stopping and self.given_up is None:
                await self._run_engine()
        except Exception as error:
            log.exception("supervising the engine failed")
            self._give_up(f"the engine's supervision failed: {type(error).__name__}: {error}")
            if self._current is not None:
                await self._current.kill()

    async def _run_engine(self) -> None:
        """One engine, from its start to its end."""
        self._epoch += 1
        try:
            process = await spawn(self._launch, self._context, Path(self._socket_dir.name), self._epoch)
        except (OSError, zmq.ZMQError) as error:
            await self._could_not_spawn(error)
            return
        self._current = process
        await self._accompany(process)
        if self.is_stopping:
            return
        status = process.process.returncode
        if self.info is None:
            self._give_up(f"the engine process ended with status {status} before it was ready")
            return
        self._current = None
        process.close()
        planned = read_flight_record(process.flight_record)
        log.error("engine %d died (status %s); in its plan: %d", process.epoch, status, len(planned))
        self._user.engine_died(planned)
        self._count_death()

    async def _could_not_spawn(self, error: OSError | zmq.ZMQError) -> None:
        """Fatal for the first engine; a later one is tried again like one that died at once."""
        reason = f"the engine process cannot be started: {error}"
        log.error("%s", reason)
        if self.info is None:
            self._give_up(reason)
            return
        self._count_death()
        await asyncio.sleep(_RESPAWN_DELAY_S)

    def _count_death(self) -> None:
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - _DEATH_WINDOW_S:
            self._deaths.popleft()
        if len(self._deaths) >= _MAX_DEATHS:
            self._give_up(
                f"the engine died {_MAX_DEATHS} times within {_DEATH_WINDOW_S:.0f} s; "
                "see the log and restart the server"
            )

    def _give_up(self, reason: str) -> None:
        log.critical("giving up: %s", reason)
        self.given_up = reason
        self._start_error = self._start_error or EngineStartFailed(reason)
        self._first_ready.set()
        self._user.engine_given_up(reason)

    # ------------------------------------------------------------ while one runs

    async def _accompany(self, process: EngineProcess) -> None:
        """Listen and watch until the process has ended and what it had sent is taken."""
        receiver = asyncio.create_task(self._receive(process))
        watcher = asyncio.create_task(self._watch(process))
        ended = asyncio.create_task(process.process.wait())
        try:
            await asyncio.wait({receiver, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                log.error("engine %d cannot be listened to; killing it", process.epoch)
                await process.kill()
            process.ready.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.drained(), 1.0)
        finally:
            for task in (receiver, watcher, ended):
                task.cancel()
            results = await asyncio.gather(receiver, watcher, ended, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                log.error("accompanying engine %d failed", process.epoch, exc_info=result)

    async def _watch(self, process: EngineProcess) -> None:
        """Kill an engine whose heartbeat has stopped, or that does not get ready: it is as good as dead."""
        launch = self._launch
        while True:
            await asyncio.sleep(1.0)
            silence_s = time.monotonic() - process.last_heard
            if process.ready.is_set():
                limit_s, what = launch.silence_timeout_s, f"has been silent for {silence_s:.0f} s"
            else:
                limit_s, what = launch.start_timeout_s, f"was not ready after {silence_s:.0f} s"
            if silence_s > limit_s:
                log.error("engine %d %s; killing it", process.epoch, what)
                self._start_error = self._start_error or EngineStartFailed(f"the engine {what}")
                process.process.kill()
                return

    async def _receive(self, process: EngineProcess) -> None:
        while True:
            epoch, message = decode(await process.from_engine.recv_multipart())
            process.last_heard = time.monotonic()
            if epoch != process.epoch:
                continue
            if isinstance(message, protocol.EngineReady):
                self.info = message
                process.ready.set()
                await self._user.engine_became_ready()
                self._first_ready.set()
            elif isinstance(message, protocol.EngineFailed):
                self._could_not_start(message)
            else:
                await self._user.engine_said(message)  # type: ignore[arg-type]

    def _could_not_start(self, message: protocol.EngineFailed) -> None:
        kind = ConfigError if message.code == ConfigError.default_code else EngineStartFailed
        self._start_error = kind(message.message, code=message.code)
        log.error("the engine cannot start: %s", message.message)
