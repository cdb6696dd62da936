"""Writing what jobs leave behind: checkpoints and finished adapters, off the engine loop.

Owns the order of a job's writes and what becomes of those that fail. Does not know what the bytes mean; the
loop polls, nothing here sleeps or starts a thread of its own.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TypeAlias

from weft_server.errors import Unavailable, WeftError
from weft_server.protocol import JobCheckpointed, JobFailed, JobSucceeded
from weft_server.training.job import FinetuneJob

log = logging.getLogger(__name__)

Saved: TypeAlias = JobCheckpointed | JobSucceeded | JobFailed

_FIRST_RETRY_S = 0.5
_LONGEST_RETRY_S = 30.0


@dataclass(slots=True, eq=False)
class _Save:
    """One write: waiting, under way (`future`), or to be repeated at `retry_at`."""

    job: FinetuneJob
    write: Callable[[], Saved]
    is_checkpoint: bool
    future: Future[Saved] | None = None
    num_failures: int = 0
    retry_at: float = 0.0


class JobSaver:
    """Writes of all jobs: one at a time for each job, in order.

    A checkpoint that cannot be written is given up (the next one covers it) and one that still waits is
    replaced by a newer one; a finished adapter is written again and again until the store takes it.
    """

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._queues: dict[str, deque[_Save]] = {}

    def checkpoint(self, job: FinetuneJob, write: Callable[[], JobCheckpointed]) -> None:
        """Write a checkpoint after what the job has under way."""
        self._add(_Save(job, write, is_checkpoint=True))

    def publish(self, job: FinetuneJob, write: Callable[[], JobSucceeded]) -> None:
        """Write a finished adapter."""
        self._add(_Save(job, write, is_checkpoint=False))

    def forget(self, job: FinetuneJob) -> None:
        """Drop what waits; what is under way ends unheard."""
        queue = self._queues.get(job.job_id)
        if queue and queue[0].job is job:
            del self._queues[job.job_id]

    def poll(self, now: float) -> list[tuple[FinetuneJob, Saved]]:
        """What has ended since the last call, in each job's order; starts what is due."""
        ended = []
        for job_id, queue in list(self._queues.items()):
            save = queue[0]
            if save.future is not None and save.future.done():
                ended += self._end(queue, now)
            if not queue:
                del self._queues[job_id]
            elif queue[0].future is None and queue[0].retry_at <= now:
                self._start(queue[0])
        return ended

    def flush(self) -> list[tuple[FinetuneJob, Saved]]:
        """Try everything that is left once, and wait for it (at shutdown)."""
        ended = []
        for queue in self._queues.values():
            while queue:
                save = queue[0]
                self._start(save)
                ended += self._end(queue, now=0.0)
                if queue and queue[0] is save:
                    queue.popleft()
        self._queues.clear()
        return ended

    @property
    def is_busy(self) -> bool:
        """True while a write is under way (not while one waits for its next attempt)."""
        return any(queue[0].future is not None for queue in self._queues.values())

    def _add(self, save: _Save) -> None:
        queue = self._queues.setdefault(save.job.job_id, deque())
        while queue and queue[-1].future is None and queue[-1].is_checkpoint:
            superseded = queue.pop()
            log.warning("job %s: a checkpoint is replaced before it was written", superseded.job.job_id)
        queue.append(save)
        if len(queue) == 1:
            self._start(save)

    def _start(self, save: _Save) -> None:
        if save.future is None:
            save.future = self._pool.submit(save.write)

    def _end(self, queue: deque[_Save], now: float) -> list[tuple[FinetuneJob, Saved]]:
        """Take in the end of the first write of a queue; it stays there only to be repeated."""
        save = queue[0]
        future, save.future = save.future, None
        if future is None:
            return []
        try:
            saved = future.result()
        except Unavailable as error:
            if save.is_checkpoint:
                self._give_up(queue, error.message)
            else:
                self._retry_later(save, error, now)
            return []
        except Exception as error:
            if save.is_checkpoint:
                self._give_up(queue, repr(error))
                return []
            queue.popleft()
            return [(save.job, _failure(save.job, error))]
        queue.popleft()
        return [(save.job, saved)]

    def _give_up(self, queue: deque[_Save], reason: str) -> None:
        job = queue.popleft().job
        log.error("job %s goes on without a checkpoint that cannot be written: %s", job.job_id, reason)

    def _retry_later(self, save: _Save, error: Unavailable, now: float) -> None:
        delay_s = min(_FIRST_RETRY_S * 2**save.num_failures, _LONGEST_RETRY_S)
        delay_s = max(delay_s, error.retry_after_s or 0.0)
        save.num_failures += 1
        save.retry_at = now + delay_s
        log.warning(
            "job %s: its adapter cannot be stored (%s); next attempt in %.1f s",
            save.job.job_id,
            error.message,
            delay_s,
        )


def _failure(job: FinetuneJob, error: Exception) -> JobFailed:
    if isinstance(error, WeftError):
        log.error("job %s: %s", job.job_id, error.message)
        return JobFailed(job.job_id, job.lease_epoch, error.code or "job_error", error.message)
    log.error("job %s could not be saved", job.job_id, exc_info=error)
    return JobFailed(job.job_id, job.lease_epoch, "internal_error", f"saving failed: {error}")
