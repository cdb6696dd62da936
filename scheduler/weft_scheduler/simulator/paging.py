"""The way of an adapter to the simulated device: from the store into host memory, from there over the link.

Transfers of one kind follow each other; host memory remembers the adapters used last.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heappop, heappush
from typing import Literal, NamedTuple

from weft_scheduler.plan import MemoryPlan
from weft_scheduler.simulator.gpus import Gpu
from weft_scheduler.simulator.shapes import DENSE_BYTES

_LOAD_LATENCY_S = 2e-4


class Arrival(NamedTuple):
    """At `due_s` an adapter has arrived: fetched to host memory, or loaded to the device."""

    due_s: float
    order: int
    kind: Literal["fetch", "load"]
    adapter: str


class Pager:
    """Latencies of fetches and loads, from bytes and bandwidths."""

    def __init__(self, gpu: Gpu, elements: dict[str, int]) -> None:
        """`elements` gives every adapter's size; those of jobs are in host memory from the start."""
        self._gpu = gpu
        self._elements = elements
        self._pending: list[Arrival] = []
        self._order = 0
        self._store_free_s = 0.0
        self._link_free_s = 0.0
        self._host: OrderedDict[str, int] = OrderedDict()
        self._host_bytes = 0
        self.num_fetches = 0
        self.num_loads = 0

    @property
    def next_due_s(self) -> float | None:
        """When the next adapter arrives; None if none is on its way."""
        return self._pending[0].due_s if self._pending else None

    def carry_out(self, memory: MemoryPlan, now_s: float) -> None:
        """Start the fetches and loads of a plan."""
        for load in memory.adapter_loads:
            num_bytes = load.num_elements * DENSE_BYTES
            self._link_free_s = max(now_s, self._link_free_s) + num_bytes / self._gpu.link_bandwidth
            self._push(self._link_free_s + _LOAD_LATENCY_S, "load", load.adapter)
            self.num_loads += 1
        for key in memory.adapter_fetches:
            self._push(self._fetched_s(key, now_s), "fetch", key)

    def due(self, now_s: float) -> list[Arrival]:
        """What has arrived by now, in order."""
        arrived = []
        while self._pending and self._pending[0].due_s <= now_s:
            arrived.append(heappop(self._pending))
        return arrived

    def _fetched_s(self, key: str, now_s: float) -> float:
        if key.startswith("job:"):
            return now_s
        if key in self._host:
            self._host.move_to_end(key)
            return now_s
        num_bytes = self._elements[key] * DENSE_BYTES
        self._store_free_s = max(now_s, self._store_free_s) + num_bytes / self._gpu.store_bandwidth
        self.num_fetches += 1
        self._host[key] = num_bytes
        self._host_bytes += num_bytes
        while self._host_bytes > self._gpu.host_cache_bytes and len(self._host) > 1:
            self._host_bytes -= self._host.popitem(last=False)[1]
        return self._store_free_s + self._gpu.store_latency_s

    def _push(self, due_s: float, kind: Literal["fetch", "load"], key: str) -> None:
        self._order += 1
        heappush(self._pending, Arrival(due_s, self._order, kind, key))
