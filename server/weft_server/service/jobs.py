"""Finetune jobs as their owners see them: create, list, watch, cancel.

A job is acknowledged once it is durable; from then on it survives every crash (`job_runner.py`). Owns what
a request for a job must satisfy. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from weft_server.errors import InvalidRequest, NotFound, Unavailable
from weft_server.metrics import Metrics
from weft_server.protocol import EngineReady, LoraSpec
from weft_server.service import hyperparameters, job_updates
from weft_server.service.adapter_versions import AdapterVersion
from weft_server.service.adapters import AdapterService
from weft_server.service.engine_port import EnginePort
from weft_server.service.files import FILE_KIND, StoredFile, file_not_found
from weft_server.service.hyperparameters import MODULES, HyperparameterRequest
from weft_server.service.idempotency import IdempotencyKey, IdempotencyTable
from weft_server.service.job_records import JOB_KIND, Job, blob_owner, event_stream, message_event
from weft_server.service.job_runner import JobRunner
from weft_server.service.job_table import JobTable
from weft_server.service.leases import DEFAULT_LEASE_S, Lease
from weft_server.service.pages import Page, scan_page
from weft_server.service.tokenizer import Tokenizer
from weft_server.store.base import (
    BlobMissing,
    BlobStore,
    Change,
    Link,
    Record,
    RecordStore,
    StaleRecord,
    StoreUnavailable,
)

MAX_SUFFIX_CHARS = 40
_SUFFIX = re.compile(r"[A-Za-z0-9._-]{1,40}")
_TICKS_PER_LEASE = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NewJob:
    """What the caller asks for. `model` is the base, `name` or `name@3`.

    With `idempotency`, asking again makes no second job.
    """

    model: str
    training_file: str
    suffix: str | None = None
    adapter_name: str | None = None
    metadata: Mapping[str, str] | None = None
    hyperparameters: HyperparameterRequest = field(default_factory=HyperparameterRequest)
    idempotency: IdempotencyKey | None = None


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One event of a job; `value` has created_at, level, message, type, data."""

    id: str
    value: Mapping[str, Any]


class JobService:
    """A tenant's finetune jobs, and the background work that carries them on."""

    def __init__(
        self,
        records: RecordStore,
        blobs: BlobStore,
        engine: EnginePort,
        tokenizer: Tokenizer,
        adapters: AdapterService,
        metrics: Metrics,
        *,
        base_name: str,
        exclusive_store: bool,
        lease_s: float = DEFAULT_LEASE_S,
    ) -> None:
        """Subscribes to the engine: construct it before the engine starts.

        Args:
            records, blobs: the stores.
            engine: runs the jobs.
            tokenizer: the base's.
            adapters: what a job may continue, and the rules for names.
            metrics: counts finished jobs and published adapters.
            base_name: the served name of the base.
            exclusive_store: no other server can share the store (its data directory is locked), so a job of
                a dead
                process is taken over at once instead of when its lease lapses.
            lease_s: how long a job stays with a server that is not heard of.
        """
        self._records = records
        self._engine = engine
        self._adapters = adapters
        self._metrics = metrics
        self._base_name = base_name
        self._lease_s = lease_s
        self._jobs = JobTable(records)
        self._keys = IdempotencyTable(records)
        self._runner = JobRunner(
            records,
            blobs,
            engine,
            tokenizer,
            metrics,
            exclusive_store=exclusive_store,
            lease_s=lease_s,
            published=adapters.pins.refresh,
        )
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to carry on unfinished jobs in the background."""
        self._loop = asyncio.get_running_loop().create_task(self._tick_forever())

    async def aclose(self) -> None:
        """Write what the engine has reported and hand unfinished jobs over. Shut the engine down before."""
        if self._loop is not None:
            self._loop.cancel()
            with suppress(asyncio.CancelledError):
                await self._loop
        await self._runner.aclose()

    async def tick(self) -> None:
        """One round of the background work; `start` calls it several times per lease.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        await self._runner.tick()
        await self._adapters.sweep_retired()

    async def create(self, tenant: str, request: NewJob) -> Job:
        """Submit a job; it is durable when this returns, its file is read afterwards.

        Where the request's key has been used before, the job that was made then is returned.

        Raises:
            InvalidRequest: a value or a combination is refused.
            Unprocessable: a value of the `weft` object is refused.
            NotFound: the file or the model is absent, or another tenant's.
            Conflict: the adapter name is the base's, or the key was used for another request.
            Unavailable: the engine or the store is away.
        """
        if request.idempotency is not None:
            earlier = await self._made_before(tenant, request.idempotency)
            if earlier is not None:
                return earlier
        info = self._engine_info()
        hyperparameters.validate(request.hyperparameters, context_tokens=info.max_model_len)
        file = await self._training_file(tenant, request.training_file)
        continued = await self._continued(tenant, request.model, info)
        continued_lora = None if continued is None else await self._lora_of(continued)
        job_id = f"ftjob-{secrets.token_hex(8)}"
        now = await asyncio.to_thread(self._records.now)
        job = Job(
            id=job_id,
            tenant=tenant,
            status="validating_files",
            created_at=int(now),
            model=request.model,
            training_file=request.training_file,
            adapter_name=self._adapter_name(request, job_id),
            suffix=request.suffix,
            metadata=request.metadata,
            hyperparameters=request.hyperparameters,
            seed=hyperparameters.seed_of(request.hyperparameters, job_id),
            lora=hyperparameters.lora_of(request.hyperparameters.lora, continued_lora),
            max_seq_length=hyperparameters.max_seq_length(
                request.hyperparameters, context_tokens=info.max_model_len
            ),
            base_fingerprint=info.base_fingerprint,
            base_adapter=None if continued is None else continued.ref,
            training_blob=file.blob,
            lease=Lease(self._runner.owner, epoch=1, until=now + self._lease_s),
        )
        try:
            await asyncio.to_thread(self._store, job, request.idempotency, now)
        except BlobMissing:
            # Deleted since it was looked up.
            raise file_not_found(request.training_file, param="training_file") from None
        except StaleRecord:
            if request.idempotency is None:
                raise
            # The same request has been faster.
            earlier = await self._made_before(tenant, request.idempotency)
            if earlier is None:
                raise
            return earlier
        self._runner.run_created(job)
        return job

    def _store(self, job: Job, key: IdempotencyKey | None, now: float) -> None:
        changes = [*_first_changes(job, now=now)]
        if key is not None:
            self._keys.forget_expired(job.tenant)
            changes.append(self._keys.claim(job.tenant, key, job.id))
        self._jobs.create(job, changes)

    async def _made_before(self, tenant: str, key: IdempotencyKey) -> Job | None:
        job_id = await asyncio.to_thread(self._keys.find, tenant, key)
        return None if job_id is None else await self.get(tenant, job_id)

    async def list(
        self,
        tenant: str,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
        without_metadata: bool = False,
    ) -> Page[Job]:
        """The tenant's jobs, newest first.

        Args:
            tenant: whose.
            after: id of the last job received.
            limit: at most so many.
            metadata: only jobs that have all these pairs.
            without_metadata: only jobs without any metadata.

        Raises:
            InvalidRequest: `after` is not a job of the tenant.
        """

        def keep(record: Record) -> bool:
            stored = record.value["metadata"]
            if without_metadata and stored is not None:
                return False
            return all((stored or {}).get(key) == value for key, value in (metadata or {}).items())

        page = await asyncio.to_thread(
            scan_page,
            self._records,
            JOB_KIND,
            tenant,
            after=after,
            limit=limit,
            keep=keep if metadata or without_metadata else None,
        )
        return Page([Job.from_record(record) for record in page.items], page.has_more)

    async def get(self, tenant: str, job_id: str) -> Job:
        """One job.

        Raises:
            NotFound: absent, or another tenant's.
        """
        job = await asyncio.to_thread(self._jobs.get, tenant, job_id)
        if job is None:
            raise _job_not_found(job_id)
        return job

    async def events(
        self, tenant: str, job_id: str, *, after: str | None = None, limit: int = 20
    ) -> Page[JobEvent]:
        """The job's events, newest first.

        Raises:
            NotFound: the job is absent, or another tenant's.
            InvalidRequest: `after` is not an event of the job.
        """
        await self.get(tenant, job_id)
        events = await asyncio.to_thread(
            self._records.events,
            event_stream(tenant, job_id),
            after=0 if after is None else _event_seq(job_id, after),
            limit=limit + 1,
            newest_first=True,
        )
        items = [JobEvent(_event_id(job_id, event.seq), event.value) for event in events[:limit]]
        return Page(items, has_more=len(events) > limit)

    async def cancel(self, tenant: str, job_id: str) -> Job:
        """Cancel an unfinished job; it is cancelled when this returns, and leaves the engine soon after.

        Raises:
            NotFound: absent, or another tenant's.
            InvalidRequest: it is finished already.
        """

        def change(job: Job) -> job_updates.JobUpdate:
            return job_updates.cancelled(job, now=self._records.now())

        job = await asyncio.to_thread(self._jobs.update, tenant, job_id, change)
        if job is None:
            raise _job_not_found(job_id)
        self._metrics.job_finished(tenant, job.status)
        await self._runner.stop(job_id)
        return job

    async def _tick_forever(self) -> None:
        while True:
            try:
                await self.tick()
            except StoreUnavailable as error:
                logger.warning("store away: %s", error.message)
            except Exception:
                logger.exception("carrying on the finetune jobs failed")
            await asyncio.sleep(self._lease_s / _TICKS_PER_LEASE)

    def _engine_info(self) -> EngineReady:
        info = self._engine.info
        if info is None:
            why = self._engine.why_not_ready or "it is starting"
            raise Unavailable(f"The engine cannot take jobs yet: {why}", retry_after_s=5.0)
        return info

    async def _training_file(self, tenant: str, file_id: str) -> StoredFile:
        record = await asyncio.to_thread(self._records.get, FILE_KIND, tenant, file_id)
        if record is None:
            raise file_not_found(file_id, param="training_file")
        file = StoredFile.from_record(record)
        if file.purpose != "fine-tune":
            raise InvalidRequest(
                f"The purpose of '{file_id}' is '{file.purpose}'; a training file's must be 'fine-tune'.",
                param="training_file",
            )
        return file

    async def _continued(self, tenant: str, model: str, info: EngineReady) -> AdapterVersion | None:
        if model == self._base_name:
            return None
        _, version = await self._adapters.find_version(tenant, model)
        if version.base_fingerprint != info.base_fingerprint:
            raise InvalidRequest(
                f"'{model}' was made for another base model than the one served here.", param="model"
            )
        return version

    async def _lora_of(self, version: AdapterVersion) -> LoraSpec:
        config = json.loads(await self._adapters.read_config(version))
        return LoraSpec(
            rank=version.max_rank,
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout", 0.0)),
            target_modules=tuple(name for name in MODULES if name in version.target_modules),
            use_rslora=bool(config.get("use_rslora", False)),
        )

    def _adapter_name(self, request: NewJob, job_id: str) -> str:
        if request.suffix is not None and not _SUFFIX.fullmatch(request.suffix):
            raise InvalidRequest(
                f"suffix is {request.suffix!r}; it must be 1 to {MAX_SUFFIX_CHARS} of the characters "
                "A-Z a-z 0-9 . _ - (it becomes part of the adapter's name).",
                param="suffix",
            )
        if request.adapter_name is None:
            return f"{request.suffix or 'ft'}-{job_id}"
        self._adapters.check_name(request.adapter_name, param="weft.adapter_name")
        return request.adapter_name


def _first_changes(job: Job, *, now: float) -> tuple[Change, ...]:
    changes: list[Change] = []
    if job.training_blob is not None:
        changes.append(Link(job.training_blob, blob_owner(job, "training")))
    if job.base_adapter is not None:
        base = (job.base_adapter.config_blob, job.base_adapter.weights_blob)
        changes += [Link(blob, blob_owner(job, "base")) for blob in base]
    changes.append(message_event(job, f"Created fine-tuning job: {job.id}", now=now))
    if job.suffix is not None and not job.adapter_name.endswith(job.id):
        text = f"The suffix is not used: weft.adapter_name names the adapter '{job.adapter_name}'"
        changes.append(message_event(job, text, now=now, level="warn"))
    changes.append(message_event(job, f"Validating training file: {job.training_file}", now=now))
    return tuple(changes)


def _job_not_found(job_id: str) -> NotFound:
    return NotFound(f"No such fine-tuning job: '{job_id}'.", param="fine_tuning_job_id", code="job_not_found")


def _event_id(job_id: str, seq: int) -> str:
    return f"ftevent-{job_id.removeprefix('ftjob-')}-{seq}"


def _event_seq(job_id: str, event_id: str) -> int:
    prefix = _event_id(job_id, 0)[:-1]
    number = event_id.removeprefix(prefix)
    if not event_id.startswith(prefix) or not re.fullmatch(r"[1-9][0-9]{0,17}", number):
        raise InvalidRequest(
            f"after is '{event_id}', which is no event of this job; give the id of the last event received.",
            param="after",
        )
    return int(number)
