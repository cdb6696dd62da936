"""Jobs in the record store: read, and changed by compare-and-set. Blocking.

Keeps the index of unfinished jobs in step with the jobs themselves. What a change is, `job_updates.py` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeAlias

from weft_server.service.job_records import ACTIVE_JOB_KIND, JOB_KIND, Job
from weft_server.service.job_updates import JobUpdate
from weft_server.store.base import Change, Create, Delete, RecordStore, StaleRecord, Update

JobChange: TypeAlias = Callable[[Job], JobUpdate | None]


class JobTable:
    """Every method may raise StoreUnavailable."""

    def __init__(self, records: RecordStore) -> None:
        self._records = records

    def create(self, job: Job, changes: Sequence[Change]) -> None:
        """Store a new, unfinished job together with `changes`."""
        self._records.apply(
            [
                Create(JOB_KIND, job.tenant, job.id, job.to_value()),
                Create(ACTIVE_JOB_KIND, job.tenant, job.id, {}),
                *changes,
            ]
        )

    def get(self, tenant: str, job_id: str) -> Job | None:
        """The job, or None."""
        record = self._records.get(JOB_KIND, tenant, job_id)
        return None if record is None else Job.from_record(record)

    def update(self, tenant: str, job_id: str, change: JobChange) -> Job | None:
        """Apply `change` to the job as it is now, again if it changed meanwhile.

        Args:
            tenant, job_id: the job.
            change: pure but for reads of the store; called once per attempt. What it raises goes through.

        Returns:
            The job as stored, or None if it is absent or `change` returned None.
        """
        while True:
            record = self._records.get(JOB_KIND, tenant, job_id)
            if record is None:
                return None
            job = Job.from_record(record)
            update = change(job)
            if update is None:
                return None
            changes: list[Change] = [Update(record, update.job.to_value()), *update.changes]
            if update.job.is_final and not job.is_final:
                index = self._records.get(ACTIVE_JOB_KIND, tenant, job_id)
                changes += [] if index is None else [Delete(index)]
            try:
                self._records.apply(changes)
            except StaleRecord:
                continue
            return update.job

    def unfinished(self) -> list[Job]:
        """All tenants' unfinished jobs, oldest first."""
        jobs = []
        for index in self._records.list(ACTIVE_JOB_KIND, None, newest_first=False):
            job = self.get(index.tenant, index.id)
            if job is not None and not job.is_final:
                jobs.append(job)
            elif job is None:
                with suppress(StaleRecord):
                    self._records.apply([Delete(index)])
        return jobs
