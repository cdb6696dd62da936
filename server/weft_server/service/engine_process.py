"""One engine process as its parent sees it: how it is started, spoken to and ended.

Owns the child process, its two sockets and its flight record. Knows nothing of what the messages mean, nor of
restarts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.asyncio

from weft_server import protocol
from weft_server.protocol import ToEngine
from weft_server.transport import encode

log = logging.getLogger(__name__)

_SHUTDOWN_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class EngineLaunch:
    """How to start an engine process: `config_json(epoch, receive, send, flight_record)` is the line that it
    reads first.

    `start_timeout_s` limits loading the model, `silence_timeout_s` the time without a heartbeat afterwards.
    """

    config_json: Callable[[int, str, str, Path], str]
    run_dir: Path
    command: tuple[str, ...] = (sys.executable, "-m", "weft_server.engine")
    start_timeout_s: float = 1800.0
    silence_timeout_s: float = 30.0


@dataclass(slots=True)
class EngineProcess:
    """A running (or dead, but not closed) engine process and its sockets."""

    epoch: int
    process: asyncio.subprocess.Process
    to_engine: zmq.asyncio.Socket
    from_engine: zmq.asyncio.Socket
    flight_record: Path
    last_heard: float
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, message: ToEngine) -> None:
        """Queue a message; a dead engine gets it no more."""
        await self.to_engine.send_multipart(encode(message, self.epoch))

    async def end(self) -> None:
        """Ask it to checkpoint its jobs and exit; kill it if it takes too long, or has none yet."""
        if not self.ready.is_set():
            await self.kill()
            return
        with contextlib.suppress(zmq.ZMQError):
            await self.send(protocol.Shutdown())
        try:
            await asyncio.wait_for(self.process.wait(), _SHUTDOWN_TIMEOUT_S)
        except TimeoutError:
            log.warning("the engine did not exit within %.0f s; killing it", _SHUTDOWN_TIMEOUT_S)
            await self.kill()

    async def kill(self) -> None:
        """SIGKILL, and wait for it. A dead one stays so."""
        self.ready.clear()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()

    async def drained(self) -> None:
        """Wait until whoever reads the socket has taken all that the engine had sent."""
        while await self.from_engine.poll(50):
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """Close the sockets."""
        self.to_engine.close(linger=0)
        self.from_engine.close(linger=0)


async def spawn(
    launch: EngineLaunch, context: zmq.asyncio.Context, socket_dir: Path, epoch: int
) -> EngineProcess:
    """Start an engine process.

    Args:
        launch: what to start.
        context: of the sockets.
        socket_dir: for their files; its path must be short.
        epoch: numbers this engine among the server's.

    Raises:
        OSError: the run folder cannot be written, or there is no room for another process.
        zmq.ZMQError: there is no room for the sockets.
    """
    launch.run_dir.mkdir(parents=True, exist_ok=True)
    flight_record = launch.run_dir / "plan"
    # Should this engine die before it plans anything, the last one's record must not be read again.
    flight_record.unlink(missing_ok=True)
    receive, send = (f"ipc://{socket_dir}/{name}-{epoch}" for name in ("to", "from"))
    config_json = launch.config_json(epoch, receive, send, flight_record)
    with contextlib.ExitStack() as opened:
        to_engine, from_engine = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        for socket, address in ((to_engine, receive), (from_engine, send)):
            opened.callback(socket.close, linger=0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.bind(address)
        process = await asyncio.create_subprocess_exec(*launch.command, stdin=asyncio.subprocess.PIPE)
        opened.pop_all()
    assert process.stdin is not None  # stays open: its end tells the engine that this process is gone
    with contextlib.suppress(ConnectionError):
        process.stdin.write(config_json.encode() + b"\n")
        await process.stdin.drain()
    log.info("engine %d started (pid %d)", epoch, process.pid)
    return EngineProcess(epoch, process, to_engine, from_engine, flight_record, time.monotonic())
