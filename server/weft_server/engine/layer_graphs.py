"""Forward layers as captured graphs: one per layer, number of rows and variant, replayed on fixed buffers.

An eager layer is some twenty launches, each of which costs the host several microseconds; a replay is one. A
batch is padded to the smallest bucket that holds it, copied into the bucket's buffers and run through the
graphs of its layers. Between layers the hidden states lie in the buffers, where whoever keeps a layer's input
copies it from. Padding changes nothing: its rows have no cache slot, no attention tile and no adapter.

How work is captured is given from outside (`Capture`), so that all but the capture itself runs on a CPU too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from weft_kernels.attention import has_kernels, table_shape
from weft_kernels.lora import LoraTable
from weft_server.cache.kv import KvCache
from weft_server.engine.graph_buffers import BatchLimits, Bucket, RowBuffers
from weft_server.engine.graph_shapes import GraphKey, GraphVariant, graph_keys, row_buckets
from weft_server.model.activations import LayerActivations
from weft_server.model.batch import TokenBatch
from weft_server.model.decoder import Decoder


class Capture(Protocol):
    """How work is captured."""

    def __call__(self, issue: Callable[[], None]) -> Callable[[], None]:
        """Given a function that issues work, a function that repeats it: same launches, same addresses.
        Whether the work is done once in between is left open."""
        ...

    def leave(self, tensor: Tensor) -> Tensor:
        """The same memory, which the work has written, without keeping other captured work from using it
        as scratch: until that is repeated it holds what was written last."""
        ...


def supports_graphs(decoder: Decoder, cache: KvCache) -> bool:
    """Whether layers are made of kernels that read all they need from the device (the reference looks at the
    batch on the host)."""
    config = decoder.config
    group = config.num_heads // config.num_kv_heads
    return decoder.device.type == "cuda" and has_kernels(cache.keys[0].dtype, group, config.head_dim)


@dataclass(slots=True)
class _LayerGraph:
    """One captured layer: `activations` are what its work writes on the way."""

    idx: int
    replay: Callable[[], None] | None = None
    activations: LayerActivations | None = None

    def run(self) -> LayerActivations:
        """Do the work; what it has written.

        Raises:
            RuntimeError: it has not been captured.
        """
        if self.replay is None:
            raise RuntimeError(f"layer {self.idx} has not been captured")
        self.replay()
        if self.activations is None:
            raise RuntimeError(f"the captured work of layer {self.idx} left nothing")
        return self.activations


class LayerGraphs:
    """The graphs of one decoder over one cache and adapter table, and the buffers that they are bound to."""

    def __init__(
        self, decoder: Decoder, cache: KvCache, table: LoraTable, limits: BatchLimits, capture: Capture
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._table = table
        self._capture = capture
        config = decoder.config
        rows = RowBuffers(decoder, limits.max_rows)
        heads = rows.hidden.new_empty(1, config.num_heads, config.head_dim)
        tables = table_shape(heads, cache.keys[0])
        sizes = row_buckets(limits.max_rows)
        self._sizes = sizes
        self._buckets = {size: Bucket(size, rows, limits, tables, table.num_slots) for size in sizes}
        self._graphs: dict[GraphKey, list[_LayerGraph]] = {}
        self._captured: dict[int, list[GraphKey]] = {size: [] for size in sizes}
        self.keys = graph_keys(sizes, limits.max_num_seqs)

    @torch.no_grad()
    def capture(self, key: GraphKey) -> None:
        """Capture all layers for one of `keys`. No batch may be in flight; the cache is not written.

        The first layer runs once beforehand, so that whatever is compiled or allocated at first use is there.
        """
        bucket = self._buckets[key.num_rows]
        batch = bucket.token_batch(key.variant)

        def issue(layer: _LayerGraph) -> None:
            _, layer.activations = self._decoder.forward_layer(
                layer.idx, bucket.hidden, batch, self._cache, self._table, bucket.rotation, out=bucket.hidden
            )

        layers = [_LayerGraph(idx) for idx in range(self._decoder.config.num_layers)]
        issue(layers[0])
        for layer in layers:
            layer.replay = self._capture(partial(issue, layer))
            if layer.activations is not None:
                layer.activations = layer.activations.map(self._capture.leave)
        self._graphs[key] = layers
        self._captured[key.num_rows].append(key)
        self._captured[key.num_rows].sort(key=_cost)

    def find(self, batch: TokenBatch) -> GraphKey | None:
        """The graphs that compute a batch with least to spare; None if there are none: it runs eagerly."""
        needed = _needed(batch, self._table)
        first = bisect_left(self._sizes, batch.attention.num_rows)
        for size in self._sizes[first:]:
            key = next((key for key in self._captured[size] if key.variant.covers(needed)), None)
            if key is not None and self._buckets[size].holds(batch):
                return key
        return None

    def load(
        self, key: GraphKey, hidden: Tensor, batch: TokenBatch
    ) -> Callable[[int, Tensor], tuple[Tensor, LayerActivations]]:
        """Make a batch the one that the graphs of `key` compute, until the next is loaded.

        Args:
            key: what `find` returned for it.
            hidden: the input of the first layer `[T, hidden]`; copied.

        Returns:
            A function of a layer and its input, which must be what the layer before returned: the layer's
            output `[T, hidden]` and what led to it, in memory that the next layer overwrites.
        """
        bucket, layers, num_rows = self._buckets[key.num_rows], self._graphs[key], len(hidden)
        bucket.fill(hidden, batch, self._decoder.rotation(batch), key.variant)

        def forward(layer: int, _: Tensor) -> tuple[Tensor, LayerActivations]:
            return bucket.hidden[:num_rows], layers[layer].run()[:num_rows]

        return forward


def _needed(batch: TokenBatch, table: LoraTable) -> GraphVariant:
    max_rank = 0 if batch.lora is None else batch.lora.max_rank(table)
    has_dropout = max_rank > 0 and batch.dropout is not None and batch.dropout.active
    return GraphVariant(bool(batch.attention.chunks), max_rank, has_dropout)


def _cost(key: GraphKey) -> tuple[bool, int, bool]:
    return key.variant.has_dropout, key.variant.max_rank, key.variant.has_chunks
