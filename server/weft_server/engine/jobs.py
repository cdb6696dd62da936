"""Finetune jobs inside the engine: loading, stepping, checkpointing and publishing.

Everything that reads or writes blobs, or parses and serializes, runs in a small thread pool; the engine loop
only collects what is done. The loop's part of a job is between `start_step` and `finish_step`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from weft_scheduler.plan import AdapterLoad
from weft_scheduler.scheduler import Scheduler
from weft_scheduler.training import PackSpec
from weft_server.adapters.image import HostImage
from weft_server.adapters.packed import PackedAdapter, new_adapter, repack
from weft_server.adapters.paths import ModuleShapes
from weft_server.adapters.peft import read_peft, write_peft
from weft_server.engine.paging import AdapterPager
from weft_server.engine.runner import Runner
from weft_server.engine.saving import JobSaver
from weft_server.errors import Unavailable, WeftError
from weft_server.protocol import (
    AdapterRef,
    FromEngine,
    JobCheckpointed,
    JobFailed,
    JobProgress,
    JobStopped,
    JobSucceeded,
    StartJob,
)
from weft_server.training.checkpoint import (
    CheckpointError,
    restore_checkpoint,
    take_checkpoint,
)
from weft_server.training.data import Dataset, DatasetError
from weft_server.training.job import FinetuneJob, JobError, StepReport

log = logging.getLogger(__name__)

_LOAD_RETRY_S = 2.0
"""How long a job waits before it is loaded again while the store is away."""
_MAX_LOADED_WAITING = 4
"""Jobs in host memory while they wait for a place on the device; beyond that one of each tenant."""


@dataclass(frozen=True, slots=True)
class BlobIO:
    """The two blob operations that the engine needs; injected by the process."""

    read: Callable[[str], bytes]
    put: Callable[[Iterable[bytes]], str]


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What a job must know of the base model."""

    num_layers: int
    shapes: ModuleShapes
    vocab_size: int
    max_model_len: int
    device: torch.device
    dtype: torch.dtype
    name: str


_LoadedJob: TypeAlias = tuple[FinetuneJob, HostImage]
"""A job in host memory, and its adapter as the arena takes it."""


class JobManager:
    """All finetune jobs of one engine."""

    def __init__(
        self,
        base: BaseFacts,
        blobs: BlobIO,
        scheduler: Scheduler,
        runner: Runner,
        pager: AdapterPager,
        *,
        max_pack_tokens: int,
    ) -> None:
        self._base = base
        self._blobs = blobs
        self._scheduler = scheduler
        self._runner = runner
        self._pager = pager
        self._max_pack_tokens = max_pack_tokens
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="jobs")
        self._waiting: dict[str, StartJob] = {}
        self._loading: dict[str, tuple[StartJob, Future[_LoadedJob]]] = {}
        self._postponed: dict[str, tuple[float, StartJob]] = {}
        self._saver = JobSaver(self._pool)
        self._packs: dict[str, set[str]] = {}
        self.active: dict[str, FinetuneJob] = {}
        self.num_steps = 0

    # ------------------------------------------------------------ from the API process

    def start(self, message: StartJob) -> None:
        """Load a job's data and state in the background, as soon as not too many others wait in memory; it
        begins when they are there."""
        if message.job_id in self.active or message.job_id in self._loading:
            return
        self._postponed.pop(message.job_id, None)
        self._waiting.setdefault(message.job_id, message)
        self._load_more()

    def cancel(self, job_id: str) -> list[FromEngine]:
        """Stop a job at once; its adapter and gradients are dropped."""
        if job_id in self._waiting:
            return [JobStopped(job_id, self._waiting.pop(job_id).lease_epoch)]
        if job_id in self._postponed:
            _, message = self._postponed.pop(job_id)
            return [JobStopped(job_id, message.lease_epoch)]
        if job_id in self._loading:
            message, future = self._loading.pop(job_id)
            future.cancel()
            return [JobStopped(job_id, message.lease_epoch)]
        job = self.active.get(job_id)
        if job is None:
            return []
        self._remove(job)
        return [JobStopped(job_id, job.lease_epoch)]

    def checkpoint_all(self) -> list[FromEngine]:
        """Write a checkpoint of every job that has trained and wait for all writes (at shutdown)."""
        for job in self.active.values():
            if job.has_place and not job.is_finished:
                self._save_checkpoint(job)
        return [message for _, message in self._saver.flush()]

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ from the engine loop

    def poll(self, now: float) -> list[FromEngine]:
        """Begin jobs that finished loading; report checkpoints and adapters that became durable."""
        messages: list[FromEngine] = []
        for due, postponed in list(self._postponed.values()):
            if due <= now:
                self.start(postponed)
        for job_id, (message, future) in list(self._loading.items()):
            if future.done():
                del self._loading[job_id]
                messages += self._begin(message, future, now)
        self._load_more()
        for job, saved in self._saver.poll(now):
            messages.append(saved)
            if not isinstance(saved, JobCheckpointed):
                self._remove(job)
        return messages

    def take_places(self, loads: Iterable[AdapterLoad]) -> None:
        """Adapters begin to be loaded: those in training have their place, and their jobs' state follows."""
        keys = {load.adapter for load in loads}
        for job in self.active.values() if keys else ():
            if job.adapter_key in keys:
                job.take_place()

    def pack_done(self, pack_id: str) -> None:
        """A pack's backward is complete: free what it kept."""
        self._runner.remove_pack(pack_id)

    def step_done(self, job_id: str, outcome: StepReport | JobError, now: float) -> list[FromEngine]:
        """After an optimizer step: publish, checkpoint or go on; a failed step ends the job alone."""
        job = self.active.get(job_id)
        if job is None:
            return []
        if isinstance(outcome, JobError):
            self._remove(job)
            return [JobFailed(job_id, job.lease_epoch, outcome.code, outcome.message)]
        self.num_steps += 1
        report = outcome
        messages: list[FromEngine] = [
            JobProgress(
                job_id=job_id,
                lease_epoch=job.lease_epoch,
                step=report.step,
                total_steps=job.spec.total_steps,
                train_loss=report.loss,
                train_mean_token_accuracy=report.token_accuracy,
                learning_rate=report.learning_rate,
                grad_norm=report.grad_norm,
                tokens_per_second=report.tokens_per_second,
                trained_tokens=job.trained_tokens,
            )
        ]
        if job.is_finished:
            # Its place in the arena is about to be somebody else's: nothing may be written there any more.
            self._publish(job)
        else:
            self._pager.refresh(job.adapter_key, job.optimizer.master)
            if job.spec.checkpoint_every and job.num_steps_done % job.spec.checkpoint_every == 0:
                self._save_checkpoint(job)
            self._start_step(job, now)
        return messages

    @property
    def is_busy(self) -> bool:
        """True while background work may produce messages."""
        return bool(self._loading or self._postponed) or self._saver.is_busy

    @property
    def num_running(self) -> int:
        """Jobs that are waiting, loading or training."""
        return len(self.active) + len(self._loading) + len(self._postponed) + len(self._waiting)

    # ------------------------------------------------------------ life of a job

    def _load_more(self) -> None:
        """Load waiting jobs, those first whose tenant has the fewest in memory, while there may be more."""
        while self._waiting:
            in_memory = Counter(message.tenant for message, _ in self._loading.values())
            in_memory.update(
                job.tenant for job in self.active.values() if not (job.has_place or job.is_finished)
            )
            message = min(self._waiting.values(), key=lambda waiting: in_memory[waiting.tenant])
            if in_memory[message.tenant] and in_memory.total() >= _MAX_LOADED_WAITING:
                return
            del self._waiting[message.job_id]
            self._loading[message.job_id] = (message, self._pool.submit(self._load, message))

    def _begin(self, message: StartJob, future: Future[_LoadedJob], now: float) -> list[FromEngine]:
        try:
            job, image = future.result()
            self._pager.check_trainable(image)
            self._scheduler.add_training_adapter(job.adapter_key, job.adapter.num_elements)
        except Unavailable as error:
            log.warning("job %s waits for the store: %s", message.job_id, error.message)
            self._postponed[message.job_id] = (now + _LOAD_RETRY_S, message)
            return []
        except (JobError, WeftError) as error:
            return [JobFailed(message.job_id, message.lease_epoch, error.code or "job_error", error.message)]
        except ValueError as error:
            return [JobFailed(message.job_id, message.lease_epoch, "adapter_too_large", str(error))]
        except Exception as error:
            log.exception("job %s could not be loaded", message.job_id)
            return [
                JobFailed(message.job_id, message.lease_epoch, "internal_error", f"loading failed: {error}")
            ]
        self.active[job.job_id] = job
        self._pager.know_training(job.adapter_key, image)
        if job.is_finished:
            self._publish(job)
            return []
        self._start_step(job, now)
        return []

    def _start_step(self, job: FinetuneJob, now: float) -> None:
        packs = job.start_step()
        self._packs[job.job_id] = {pack.pack_id for pack in packs}
        for pack in packs:
            self._runner.add_pack(pack)
            self._scheduler.add_pack(
                PackSpec(
                    pack_id=pack.pack_id,
                    job_id=job.job_id,
                    tenant=job.tenant,
                    num_tokens=pack.num_tokens,
                    adapter=job.adapter_key,
                    num_target_tokens=pack.num_targets,
                ),
                now,
            )
        self._scheduler.step_ready(job.job_id, now)

    def _remove(self, job: FinetuneJob) -> None:
        self.active.pop(job.job_id, None)
        self._saver.forget(job)
        self._release(job)

    def _release(self, job: FinetuneJob) -> None:
        """Give back the job's place on the device."""
        self._scheduler.remove_job(job.job_id)
        self._pager.forget_training(job.adapter_key)
        for pack_id in self._packs.pop(job.job_id, ()):
            self._runner.remove_pack(pack_id)

    def _save_checkpoint(self, job: FinetuneJob) -> None:
        snapshot = take_checkpoint(job)

        def write() -> JobCheckpointed:
            blob = self._blobs.put([snapshot.to_bytes()])
            return JobCheckpointed(snapshot.job_id, job.lease_epoch, snapshot.step, blob)

        self._saver.checkpoint(job, write)

    def _publish(self, job: FinetuneJob) -> None:
        weights = job.weights_on_host()
        self._release(job)
        job.give_up_place()

        def write() -> JobSucceeded:
            adapter = repack(job.adapter, weights)
            config_json, tensors = write_peft(adapter, base_model_name=self._base.name)
            config_blob, weights_blob = self._blobs.put([config_json]), self._blobs.put([tensors])
            return JobSucceeded(
                job_id=job.job_id,
                lease_epoch=job.lease_epoch,
                step=job.num_steps_done,
                trained_tokens=job.trained_tokens,
                adapter=AdapterRef(adapter.digest, config_blob, weights_blob, len(tensors)),
                max_rank=adapter.max_rank,
                target_modules=list(adapter.target_modules),
                num_parameters=adapter.num_parameters,
            )

        self._saver.publish(job, write)

    # ------------------------------------------------------------ in the pool

    def _load(self, message: StartJob) -> _LoadedJob:
        try:
            dataset = Dataset(self._blobs.read(message.dataset_blob))
        except DatasetError as error:
            raise JobError("bad_dataset", str(error)) from error
        if not len(dataset):
            raise JobError("bad_dataset", "the dataset has no examples")
        if dataset.max_token_id >= self._base.vocab_size:
            raise JobError(
                "bad_dataset",
                f"token id {dataset.max_token_id} is outside the vocabulary of {self._base.vocab_size}",
            )
        self._check_lengths(dataset)
        job = FinetuneJob(
            message.job_id,
            message.tenant,
            message.spec,
            dataset,
            self._initial_adapter(message),
            lease_epoch=message.lease_epoch,
            device=self._base.device,
            max_pack_tokens=self._max_pack_tokens,
        )
        if message.checkpoint_blob is not None:
            try:
                restore_checkpoint(job, self._blobs.read(message.checkpoint_blob))
            except CheckpointError as error:
                raise JobError("bad_checkpoint", str(error)) from error
        current = replace(job.adapter, weights=job.weights_on_host())
        pin_memory = self._base.device.type == "cuda"
        if pin_memory:
            job.pin()
        return job, HostImage.build(current, self._base.dtype, pin_memory=pin_memory)

    def _check_lengths(self, dataset: Dataset) -> None:
        most = min(self._base.max_model_len, self._scheduler.limits.max_pack_tokens)
        for idx, length in enumerate(dataset.lengths):
            if length > most:
                raise JobError(
                    "example_too_long",
                    f"the example on line {dataset.line(idx)} has {length} tokens; this server trains on at "
                    f"most {most} at a time: shorten it or lower max_seq_length",
                )

    def _initial_adapter(self, message: StartJob) -> PackedAdapter:
        lora, ref = message.spec.lora, message.base_adapter
        if ref is not None:
            adapter = read_peft(
                self._blobs.read(ref.config_blob),
                self._blobs.read(ref.weights_blob),
                num_layers=self._base.num_layers,
                shapes=self._base.shapes,
            )
            return adapter.to(torch.float32)
        return new_adapter(
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            target_modules=lora.target_modules,
            use_rslora=lora.use_rslora,
            num_layers=self._base.num_layers,
            shapes=self._base.shapes,
            seed=message.spec.seed,
        )
