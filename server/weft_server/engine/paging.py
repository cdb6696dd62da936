"""Carries out the scheduler's adapter decisions: fetch, load into the arena, evict. Bytes only; the policy is
elsewhere.

Fetching runs in the fetcher's threads. Loading is one contiguous copy: asynchronous on a GPU, a memory copy
on a CPU.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from weft_scheduler.plan import AdapterLoad, MemoryPlan
from weft_scheduler.scheduler import Scheduler
from weft_server.adapters.arena import AdapterArena, LoadHandle
from weft_server.adapters.errors import AdapterError, AdapterFetchFailed
from weft_server.adapters.fetch import AdapterFetcher
from weft_server.adapters.image import HostImage
from weft_server.protocol import AdapterRef

log = logging.getLogger(__name__)

_MB = 1 << 20
_COUNTERS = (
    "adapter_loads",
    "adapter_load_seconds",
    "adapter_evictions",
    "adapter_moves",
    "adapter_requests_on_device",
    "adapter_requests_on_host",
    "adapter_requests_absent",
)


@dataclass(frozen=True, slots=True)
class FetchFailure:
    """An adapter that could not be fetched, the sequences that waited for it, and why."""

    digest: str
    request_ids: list[str]
    status: int
    code: str
    message: str


class AdapterPager:
    """Moves adapters between store, host cache and arena as plans say."""

    def __init__(
        self,
        arena: AdapterArena,
        fetcher: AdapterFetcher,
        scheduler: Scheduler,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._arena = arena
        self._fetcher = fetcher
        self._scheduler = scheduler
        self._refs: dict[str, AdapterRef] = {}
        self._num_requests: Counter[str] = Counter()
        self._training: dict[str, HostImage] = {}
        self._fetched: dict[str, HostImage] = {}
        self._num_fetching = 0
        self._slots: dict[str, int] = {}
        self._loading: list[tuple[AdapterLoad, LoadHandle, float]] = []
        self._pinned: set[str] = set()
        self._clock = clock
        self._counts = dict.fromkeys(_COUNTERS, 0.0)

    def know(self, ref: AdapterRef) -> None:
        """A request needs this adapter: remember where its blobs are, for when the scheduler asks for it."""
        if ref.digest in self._slots:
            self._counts["adapter_requests_on_device"] += 1
        elif ref.digest in self._fetched or self._fetcher.has_image(ref.digest):
            self._counts["adapter_requests_on_host"] += 1
        else:
            self._counts["adapter_requests_absent"] += 1
        self._remember(ref)

    def pin_exactly(self, refs: Sequence[AdapterRef]) -> None:
        """Keep these adapters on the device as far as pins have room, and no others."""
        wanted = {ref.digest: ref for ref in refs}
        for digest in self._pinned - wanted.keys():
            self._pinned.remove(digest)
            self._scheduler.unpin_adapter(digest)
            self.forget(digest)
        for digest, ref in wanted.items():
            if digest not in self._pinned:
                self._pinned.add(digest)
                self._remember(ref)
                self._scheduler.pin_adapter(digest)

    def _remember(self, ref: AdapterRef) -> None:
        self._refs[ref.digest] = ref
        self._num_requests[ref.digest] += 1

    def forget(self, digest: str) -> None:
        """A request or a pin that needed it has ended; with the last goes what was fetched, not loaded."""
        self._num_requests[digest] -= 1
        if not self._num_requests[digest]:
            del self._num_requests[digest], self._refs[digest]
            self._fetched.pop(digest, None)

    def know_training(self, key: str, image: HostImage) -> None:
        """Register an adapter in training: its image is at hand and is never fetched."""
        self._training[key] = image

    def forget_training(self, key: str) -> None:
        """The job is gone."""
        self._training.pop(key, None)

    def refresh(self, key: str, weights: Tensor) -> None:
        """Write a training adapter's new weights (its fp32 master) to its place in the arena, which it keeps
        as long as its job lives."""
        self._arena.write(self._slots[key], weights)

    def carry_out(self, memory: MemoryPlan) -> None:
        """Start a plan's memory actions; none of them is waited for."""
        for digest, slot in memory.adapter_evictions:
            self._arena.clear(slot)
            self._slots.pop(digest, None)
            self._counts["adapter_evictions"] += 1
        for move in memory.adapter_moves:
            self._arena.move(move.slot, move.destination)
            self._counts["adapter_moves"] += 1
        for load in memory.adapter_loads:
            image = self._training.get(load.adapter) or self._fetched.pop(load.adapter)
            started_s = self._clock()
            handle = self._arena.load_async(load.slot, load.offset, image)
            self._loading.append((load, handle, started_s))
        for key in memory.adapter_fetches:
            self._fetch(key)
        self._finish_loads()

    def poll(self) -> list[FetchFailure]:
        """Report to the scheduler what has arrived since the last call; returns what failed."""
        self._finish_loads()
        failures = []
        for done in self._fetcher.completed():
            self._num_fetching -= 1
            error = done.error
            if done.image is not None:
                reason = self._scheduler.adapter_fetched(done.digest, done.image.num_elements)
                if reason is None:
                    if done.digest in self._refs:
                        self._fetched[done.digest] = done.image
                    continue
                log.info("%s", reason)
                error = self._too_large(done.image, self._scheduler.max_adapter_elements, "a request's")
            error = error or AdapterFetchFailed("the fetch ended without a result")
            waiting = self._scheduler.adapter_failed(done.digest)
            if done.digest in self._pinned and not waiting:
                log.warning("a pinned adapter is not on the device: %s", error.message)
            code = error.code or "adapter_error"
            failures.append(FetchFailure(done.digest, waiting, error.status, code, error.message))
        return failures

    def counters(self) -> dict[str, float]:
        """What has been counted since the start, by metric name without prefix."""
        return dict(self._counts)

    def check_trainable(self, image: HostImage) -> None:
        """Refuse an adapter that no job could train here.

        Raises:
            AdapterError: `adapter_too_large`.
        """
        most = self._scheduler.max_training_adapter_elements
        if image.num_elements > most:
            raise self._too_large(image, most, "a job's")

    def _too_large(self, image: HostImage, max_elements: int, whose: str) -> AdapterError:
        itemsize = image.weights.element_size()
        arena_bytes = self._arena.num_elements * itemsize
        wanted_mb = -(-image.nbytes * arena_bytes // max(1, max_elements * itemsize) // _MB)
        return AdapterError(
            f"The adapter takes {_mb(image.nbytes)} MiB, but {whose} adapter may take at most "
            f"{_mb(max_elements * itemsize)} MiB of the adapter arena of {_mb(arena_bytes)} MiB. Use a "
            "smaller rank or fewer target modules, or let the operator start the server with "
            f"--adapter-arena-mb {wanted_mb} or more.",
            code="adapter_too_large",
        )

    @property
    def is_busy(self) -> bool:
        """True while a fetch or load is under way."""
        return bool(self._loading) or self._num_fetching > 0

    def _fetch(self, key: str) -> None:
        if key in self._training:
            self._scheduler.adapter_fetched(key, self._training[key].num_elements)
            return
        self._num_fetching += 1
        self._fetcher.submit(self._refs[key])

    def _finish_loads(self) -> None:
        still_loading = []
        for load, handle, started_s in self._loading:
            if handle.ready():
                handle.finish()
                self._slots[load.adapter] = load.slot
                self._scheduler.adapter_loaded(load.adapter)
                self._counts["adapter_loads"] += 1
                self._counts["adapter_load_seconds"] += self._clock() - started_s
            else:
                still_loading.append((load, handle, started_s))
        self._loading = still_loading


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / _MB:.2f}"
