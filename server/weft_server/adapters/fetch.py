"""Fetching adapters from the store, off the engine loop.

Owns a few threads that read blobs, parse and check them, cast them to the arena's dtype and put the images in
the host cache. The engine loop submits and polls; neither call blocks. Where blobs come from is injected.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol, TypeAlias, TypeVar

import torch

from weft_server.adapters.errors import AdapterFetchFailed
from weft_server.adapters.host_cache import HostCache
from weft_server.adapters.image import HostImage
from weft_server.adapters.layout import ModuleShapes
from weft_server.adapters.packed import PackedAdapter
from weft_server.adapters.peft import read_peft
from weft_server.errors import WeftError

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
ReadBlob: TypeAlias = Callable[[str], bytes]


class AdapterLocation(Protocol):
    """Where an adapter version is stored; `protocol.AdapterRef` is one."""

    @property
    def digest(self) -> str:
        """The version's digest."""

    @property
    def config_blob(self) -> str:
        """Blob id of `adapter_config.json`."""

    @property
    def weights_blob(self) -> str:
        """Blob id of `adapter_model.safetensors`."""


@dataclass(frozen=True, slots=True)
class FetchResult:
    """The end of one fetch: exactly one of `image` and `error` is set."""

    digest: str
    image: HostImage | None = None
    error: WeftError | None = None


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """What is told of an adapter that fits the base. `num_elements` is what it takes of the arena."""

    digest: str
    max_rank: int
    target_modules: tuple[str, ...]
    num_parameters: int
    num_elements: int
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The end of one check: exactly one of `summary` and `error` is set."""

    check_id: str
    summary: AdapterSummary | None = None
    error: WeftError | None = None


class AdapterFetcher:
    """Reads adapters for one base model in the background.

    Args:
        read_blob: blob id → verified bytes; called on the fetcher's threads, may block and raise.
        cache: where images go.
        num_layers, shapes: the base that adapters must fit.
        dtype: of the arena.
        pin_memory: True for a CUDA arena.
        num_threads: fetches that run at a time; checks of uploads run beside them, one at a time.
    """

    def __init__(
        self,
        read_blob: ReadBlob,
        cache: HostCache,
        *,
        num_layers: int,
        shapes: ModuleShapes,
        dtype: torch.dtype,
        pin_memory: bool = False,
        num_threads: int = 2,
    ) -> None:
        self._read_blob = read_blob
        self._cache = cache
        self._num_layers = num_layers
        self._shapes = dict(shapes)
        self._dtype = dtype
        self._pin_memory = pin_memory
        self._fetches: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._checks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._fetched: SimpleQueue[FetchResult] = SimpleQueue()
        self._checked: SimpleQueue[CheckResult] = SimpleQueue()
        self._fetching: set[str] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        # Uploads are checked on a thread of their own: no request waits behind them for its adapter.
        queues = [self._checks, *(self._fetches for _ in range(num_threads))]
        self._threads = [
            threading.Thread(target=self._run, args=(queue,), name=f"adapters-{i}", daemon=True)
            for i, queue in enumerate(queues)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, adapter: AdapterLocation) -> None:
        """Fetch an adapter; its result comes from `completed`. One already under way is not fetched twice."""
        image = self._cache.try_get(adapter.digest)
        if image is not None:
            self._fetched.put(FetchResult(adapter.digest, image=image))
            return
        with self._lock:
            if adapter.digest in self._fetching:
                return
            self._fetching.add(adapter.digest)
        self._fetches.put(lambda: self._fetch(adapter))

    def has_image(self, digest: str) -> bool:
        """Whether an adapter's image is in host memory now."""
        return digest in self._cache

    def submit_check(self, check_id: str, config_blob: str, weights_blob: str) -> None:
        """Check an upload against the base without keeping it; its result comes from `checked`."""
        self._checks.put(lambda: self._check(check_id, config_blob, weights_blob))

    def completed(self) -> list[FetchResult]:
        """Fetches that ended since the last call. Never blocks."""
        return _drain(self._fetched)

    def checked(self) -> list[CheckResult]:
        """Checks that ended since the last call. Never blocks."""
        return _drain(self._checked)

    def close(self) -> None:
        """Drop what has not begun and end the threads; blocks until what has begun is done."""
        self._closed.set()
        self._checks.put(None)
        for _ in self._threads[1:]:
            self._fetches.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, queue: SimpleQueue[Callable[[], None] | None]) -> None:
        while (work := queue.get()) is not None:
            if not self._closed.is_set():
                work()

    def _fetch(self, adapter: AdapterLocation) -> None:
        try:
            result = FetchResult(adapter.digest, image=self._fetch_image(adapter))
        except Exception as error:
            result = FetchResult(adapter.digest, error=_as_weft_error(error, f"adapter {adapter.digest}"))
        with self._lock:
            self._fetching.discard(adapter.digest)
        self._fetched.put(result)

    def _fetch_image(self, adapter: AdapterLocation) -> HostImage:
        packed, _ = self._read(adapter.config_blob, adapter.weights_blob)
        if packed.digest != adapter.digest:
            raise AdapterFetchFailed(
                f"adapter {adapter.digest} is stored with other content ({packed.digest}); upload it again"
            )
        image = HostImage.build(packed, self._dtype, pin_memory=self._pin_memory)
        self._cache.put(image)
        return image

    def _check(self, check_id: str, config_blob: str, weights_blob: str) -> None:
        try:
            packed, weights_bytes = self._read(config_blob, weights_blob)
            HostImage.build(packed, self._dtype)
            result = CheckResult(check_id, summary=_summary(packed, weights_bytes))
        except Exception as error:
            result = CheckResult(check_id, error=_as_weft_error(error, f"upload {check_id}"))
        self._checked.put(result)

    def _read(self, config_blob: str, weights_blob: str) -> tuple[PackedAdapter, int]:
        config_json, weights = self._read_blob(config_blob), self._read_blob(weights_blob)
        packed = read_peft(config_json, weights, num_layers=self._num_layers, shapes=self._shapes)
        return packed, len(weights)


def _summary(packed: PackedAdapter, weights_bytes: int) -> AdapterSummary:
    return AdapterSummary(
        digest=packed.digest,
        max_rank=packed.max_rank,
        target_modules=packed.target_modules,
        num_parameters=packed.num_parameters,
        num_elements=packed.num_elements,
        weights_bytes=weights_bytes,
    )


def _as_weft_error(error: Exception, what: str) -> WeftError:
    if isinstance(error, WeftError):
        return error
    _log.exception("cannot read %s", what, exc_info=error)
    return AdapterFetchFailed(f"{what} could not be read from the store ({type(error).__name__}); try again")


def _drain(queue: SimpleQueue[_Result]) -> list[_Result]:
    results: list[_Result] = []
    while True:
        try:
            results.append(queue.get_nowait())
        except Empty:
            return results
