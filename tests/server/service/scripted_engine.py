"""An engine process without a model: the real process around an engine that does what prompts tell it to.

Run as a script, as `python -m weft_server.engine` is. A request gets as many tokens as it asks for, one an
iteration; its first prompt token decides its fate:

    POISON    the process dies when the third token is due
    HANG      the iteration with the third token never ends
    other     nothing happens

A job does a step an iteration, 40 in all; one with seed POISON kills the process in its third.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from weft_server import protocol
from weft_server.engine.build import BuiltEngine
from weft_server.engine.config import EngineConfig
from weft_server.engine.jobs import BlobIO
from weft_server.engine.process import main
from weft_server.flight_recorder import FlightRecorder

POISON, HANG, ABSORBING = 666, 777, 888
JOB_STEPS = 40
READY = protocol.EngineReady(512, 1000, 8, 256, 4096, 0, "cpu", "float32", "none", "base-1", 50.0, 2000.0)


@dataclass
class ScriptedEngine:
    """What `engine/process.py` asks of an engine."""

    recorder: FlightRecorder
    requests: dict[str, tuple[protocol.Generate, int]] = field(default_factory=dict)
    jobs: dict[str, tuple[protocol.StartJob, int]] = field(default_factory=dict)
    ran: bool = False
    awaits_background: bool = False

    @property
    def has_work(self) -> bool:
        return bool(self.requests or self.jobs)

    def handle(self, message: protocol.ToEngine) -> None:
        if isinstance(message, protocol.Generate):
            self.requests[message.request_id] = (message, len(message.generated))
        elif isinstance(message, protocol.StartJob):
            self.jobs[message.job_id] = (message, 0)
        elif isinstance(message, protocol.Abort):
            self.requests.pop(message.request_id, None)

    def step(self, has_arrivals: Callable[[], bool]) -> list[protocol.FromEngine]:
        self.ran = self.has_work
        if not self.ran:
            return []
        self.recorder.record([*self.requests, *self.jobs])
        time.sleep(0.005)
        if self._is_absorbed():
            while not has_arrivals():
                time.sleep(0.001)
        messages: list[protocol.FromEngine] = [self._train(job_id) for job_id in list(self.jobs)]
        return [*messages, protocol.StepOutput([self._decode(name) for name in list(self.requests)])]

    def _is_absorbed(self) -> bool:
        """A job of the absorbing kind, at its third step, goes on until a request arrives."""
        jobs = self.jobs.values()
        return not self.requests and any(
            job.spec.seed == ABSORBING and num_done == 2 for job, num_done in jobs
        )

    def _decode(self, request_id: str) -> protocol.ChoiceDelta:
        request, num_done = self.requests[request_id]
        if num_done == 2 and request.prompt[0] == POISON:
            os._exit(9)
        if num_done == 2 and request.prompt[0] == HANG:
            threading.Event().wait()
        is_last = num_done + 1 == request.sampling.max_tokens
        self.requests[request_id] = (request, num_done + 1)
        if is_last:
            del self.requests[request_id]
        return protocol.ChoiceDelta(request_id, [num_done], finish_reason="length" if is_last else None)

    def _train(self, job_id: str) -> protocol.FromEngine:
        job, num_done = self.jobs[job_id]
        if num_done == 2 and job.spec.seed == POISON:
            os._exit(9)
        self.jobs[job_id] = (job, num_done + 1)
        if num_done + 1 < JOB_STEPS:
            return protocol.JobProgress(
                job_id, job.lease_epoch, num_done + 1, JOB_STEPS, 1.0, 0.5, 1e-4, 0.5, 100.0, 10
            )
        del self.jobs[job_id]
        adapter = protocol.AdapterRef("digest", "config", "weights", 1)
        return protocol.JobSucceeded(job_id, job.lease_epoch, JOB_STEPS, 400, adapter, 4, ["q_proj"], 10)

    def shut_down(self) -> list[protocol.FromEngine]:
        return []

    def close(self) -> None:
        return None

    def heartbeat(self) -> protocol.Heartbeat:
        return protocol.Heartbeat(0, {}, {})


def _build(_config: EngineConfig, _blobs: BlobIO, recorder: FlightRecorder) -> BuiltEngine:
    return BuiltEngine(cast(Any, ScriptedEngine(recorder)), READY, cast(Any, None), dict)


if __name__ == "__main__":
    status = main(_build, stuck_after_s=1.0)
    sys.stdout.flush()
    os._exit(status)
