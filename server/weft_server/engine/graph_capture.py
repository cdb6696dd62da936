"""Capturing CUDA graphs, and all graphs of an engine at its start, within limits of time and memory."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from weft_server.engine.layer_graphs import LayerGraphs

log = logging.getLogger(__name__)

MAX_CAPTURE_S = 60.0
"""What has not been captured by then runs eagerly."""


class CudaCapture:
    """Captures work as CUDA graphs that share one pool of scratch memory.

    Sharing is safe because graphs of one engine run one after the other, and what a graph leaves in the pool
    is read before the next one runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, issue: Callable[[], None]) -> Callable[[], None]:
        """The replay of what `issue` launches; it runs on the stream that is current then."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Other threads go on using the device: only this one is held to what a capture allows.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                issue()
            finally:
                graph.capture_end()
        return graph.replay

    @staticmethod
    def leave(tensor: Tensor) -> Tensor:
        """A tensor over the same memory that does not own it: the pool's, as long as a graph of it lives."""
        words = torch.as_tensor(_DeviceMemory(tensor), device=tensor.device)
        return words.view(tensor.dtype).view(tensor.shape)


class _DeviceMemory:
    """A contiguous tensor's memory, by the CUDA array interface; it does not keep the tensor alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


def capture_graphs(graphs: LayerGraphs, device: torch.device, *, max_bytes: int) -> None:
    """Capture as many of the graphs as fit into `max_bytes` of the device's memory and a minute.

    Args:
        max_bytes: what graphs and their scratch may take; overstepped by one bucket's graphs at most.
    """
    torch.cuda.synchronize(device)
    free_before, started = torch.cuda.mem_get_info(device)[0], time.perf_counter()
    num_captured = taken = 0
    with _without_garbage_collection():
        for key in graphs.keys:
            if taken >= max_bytes or time.perf_counter() - started >= MAX_CAPTURE_S:
                log.warning("captured only %d of %d sets of graphs", num_captured, len(graphs.keys))
                break
            graphs.capture(key)
            num_captured += 1
            taken = free_before - torch.cuda.mem_get_info(device)[0]
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    log.info("captured %d sets of layer graphs in %.1f s, %d MiB", num_captured, seconds, taken >> 20)


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """A collection during a capture may free what must not be freed then, and costs more than the capture."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
