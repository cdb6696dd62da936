"""Writes a job as the server that owns it, for as long as it takes.

Every write is fenced by the job's lease and epoch and made again until the store answers. Owns the retrying
and the counting of finished jobs; what is written, `job_updates.py` says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TypeAlias, TypeVar

from weft_server.metrics import Metrics
from weft_server.service.job_records import Job
from weft_server.service.job_table import JobChange, JobTable
from weft_server.service.job_updates import JobUpdate
from weft_server.store.base import RecordStore, StoreUnavailable

_FIRST_RETRY_S = 0.1
_MAX_RETRY_S = 5.0

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
TimedChange: TypeAlias = Callable[[Job, float], JobUpdate | None]


class JobWriter:
    """The jobs that `owner` holds leases of."""

    def __init__(self, records: RecordStore, metrics: Metrics, owner: str) -> None:
        self._records = records
        self._metrics = metrics
        self._owner = owner
        self._jobs = JobTable(records)

    async def persist(self, tenant: str, job_id: str, epoch: int, change: TimedChange) -> Job | None:
        """Change a job, waiting as long as the store is away.

        Args:
            tenant, job_id: the job.
            epoch: the lease's; under another one nothing is changed.
            change: from the job and the store's clock to its update; runs in a thread, once per attempt.

        Returns:
            The job as stored, or None if nothing was changed.

        Raises:
            BlobMissing: the change links a blob that is gone.
        """
        fenced = self.fenced(epoch, change)
        job = await retrying(lambda: self._jobs.update(tenant, job_id, fenced))
        if job is not None and job.is_final:
            self._metrics.job_finished(job.tenant, job.status)
            if job.status == "succeeded":
                self._metrics.adapter_published(job.tenant, "job")
        return job

    def fenced(self, epoch: int, change: TimedChange) -> JobChange:
        """`change`, unless the lease is no longer the owner's in this epoch."""

        def fenced(job: Job) -> JobUpdate | None:
            lease = job.lease
            if lease is None or not lease.held_by(self._owner) or lease.epoch != epoch:
                return None
            return change(job, self._records.now())

        return fenced


async def retrying(call: Callable[[], Result]) -> Result:
    """The result of a blocking call, made in a thread, again and again while the store is away."""
    delay_s = _FIRST_RETRY_S
    while True:
        try:
            return await asyncio.to_thread(call)
        except StoreUnavailable as error:
            logger.warning("store away, trying again: %s", error.message)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _MAX_RETRY_S)
