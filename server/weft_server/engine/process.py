"""The engine process: reads its configuration, builds the engine, and runs the loop between two sockets.

Run as `python -m weft_server.engine` with one line of JSON (`EngineConfig`) on standard input, which the API
process keeps open: its end means that the API process is gone, and the engine with it.

    main thread      takes messages, steps the engine, sends what it returns
    receiver         socket → queue
    heartbeat        twice a second, also while a long iteration runs, but not while one hangs
    parent watch     waits for the end of standard input
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeAlias

import zmq

from weft_server.engine.build import BuiltEngine, build_engine
from weft_server.engine.config import EngineConfig
from weft_server.engine.engine import Engine
from weft_server.engine.jobs import BlobIO
from weft_server.engine.loop_watch import LoopWatch
from weft_server.errors import WeftError
from weft_server.flight_recorder import FlightRecorder
from weft_server.protocol import EngineFailed, FromEngine, Shutdown, ToEngine
from weft_server.store.opening import open_blobs
from weft_server.transport import decode, encode

log = logging.getLogger(__name__)

Build: TypeAlias = Callable[[EngineConfig, BlobIO, FlightRecorder], BuiltEngine]

STUCK_AFTER_S = 60.0
"""An iteration that lasts longer is taken to hang: the latency budget allows for a tenth of it."""

COST_MODEL_FILE = "cost_model.json"
"""In the data folder: the fitted cost model, written when the engine stops."""

_HEARTBEAT_S = 0.5
_IDLE_POLL_S = 0.5
_BUSY_POLL_S = 0.002


class _Sender:
    """A socket that several threads send on."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, epoch: int) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(address)
        self._epoch = epoch
        self._lock = threading.Lock()

    def send(self, message: FromEngine) -> None:
        with self._lock:
            self._socket.send_multipart(encode(message, self._epoch))

    def close(self) -> None:
        with self._lock:
            self._socket.close(linger=2000)


def _build(config: EngineConfig, blobs: BlobIO, recorder: FlightRecorder) -> BuiltEngine:
    return build_engine(config, blobs, record_plan=recorder.record)


def main(build: Build = _build, *, stuck_after_s: float = STUCK_AFTER_S) -> int:
    """Entry point; returns the exit status.

    Args:
        build: makes the engine that is run.
        stuck_after_s: heartbeats end when one iteration lasts longer.
    """
    config = EngineConfig.from_json(sys.stdin.readline())
    logging.basicConfig(
        level=config.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s engine %(name)s: %(message)s",
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the API process decides.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, name="parent-watch", daemon=True).start()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sender = _Sender(context, config.send_address, config.epoch)
    try:
        with open_blobs(config.store_url, Path(config.data_dir)) as store:
            blob_io = BlobIO(read=store.read_bytes, put=store.put)
            return _serve(config, build, blob_io, context, sender, stuck_after_s)
    finally:
        sender.close()
        context.term()  # the receiver closes its socket when it hears of this


def _serve(
    config: EngineConfig,
    build: Build,
    blobs: BlobIO,
    context: zmq.Context[zmq.Socket[bytes]],
    sender: _Sender,
    stuck_after_s: float,
) -> int:
    try:
        recorder = FlightRecorder(Path(config.flight_record))
        built = build(config, blobs, recorder)
    except WeftError as error:
        sender.send(EngineFailed(error.message, error.code or "engine_start_failed"))
        return 1
    except (MemoryError, RuntimeError, OSError, ValueError) as error:
        log.exception("the engine cannot start")
        sender.send(EngineFailed(f"{type(error).__name__}: {error}", "engine_start_failed"))
        return 1
    inbox: SimpleQueue[ToEngine] = SimpleQueue()
    threading.Thread(target=_receive, args=(context, config, inbox), name="receiver", daemon=True).start()
    watch = LoopWatch()
    beat = (built.engine, sender, watch, stuck_after_s)
    threading.Thread(target=_beat, args=beat, name="heartbeat", daemon=True).start()
    sender.send(built.ready)
    _loop(config, built, inbox, sender, recorder, watch)
    return 0


def _loop(
    config: EngineConfig,
    built: BuiltEngine,
    inbox: SimpleQueue[ToEngine],
    sender: _Sender,
    recorder: FlightRecorder,
    watch: LoopWatch,
) -> None:
    engine = built.engine
    while True:
        messages = _take(inbox, engine)
        if any(isinstance(message, Shutdown) for message in messages):
            break
        with watch.busy():
            for message in messages:
                engine.handle(message)
            for answer in engine.step(lambda: not inbox.empty()):
                sender.send(answer)
            if not engine.has_work:
                recorder.record(())
    # Not watched: saving may take long, and the API process has a limit of its own for it.
    for last in engine.shut_down():
        sender.send(last)
    _write_cost_model(built, Path(config.data_dir))
    engine.close()


def _write_cost_model(built: BuiltEngine, data_dir: Path) -> None:
    """Leave what was learnt of this device to `weft simulate`; a full disk loses no more than that."""
    path = data_dir / COST_MODEL_FILE
    try:
        path.write_text(json.dumps(built.describe_device(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)


def _take(inbox: SimpleQueue[ToEngine], engine: Engine) -> list[ToEngine]:
    """Everything that has arrived; waits a little for the first message when the engine had nothing to do."""
    messages: list[ToEngine] = []
    try:
        if not engine.ran:
            waits_for_work = engine.has_work or engine.awaits_background
            messages.append(inbox.get(timeout=_BUSY_POLL_S if waits_for_work else _IDLE_POLL_S))
        while True:
            messages.append(inbox.get_nowait())
    except Empty:
        return messages


def _receive(
    context: zmq.Context[zmq.Socket[bytes]], config: EngineConfig, inbox: SimpleQueue[ToEngine]
) -> None:
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(config.receive_address)
    try:
        while True:
            epoch, message = decode(socket.recv_multipart())
            if epoch == config.epoch:
                inbox.put(message)  # type: ignore[arg-type]
    except zmq.ContextTerminated:
        return
    finally:
        socket.close(linger=0)


def _beat(engine: Engine, sender: _Sender, watch: LoopWatch, stuck_after_s: float) -> None:
    is_stuck = False
    while True:
        time.sleep(_HEARTBEAT_S)
        was_stuck, is_stuck = is_stuck, watch.busy_for_s > stuck_after_s
        if is_stuck:
            if not was_stuck:
                log.critical("an iteration has lasted longer than %.0f s; no more heartbeats", stuck_after_s)
                faulthandler.dump_traceback()
            continue
        try:
            sender.send(engine.heartbeat())
        except zmq.ZMQError:
            return


def _exit_with_parent() -> None:
    while sys.stdin.read(1):
        pass
    os._exit(3)
