"""Layer-major windowed backward: executes the slices of a wave in whatever portions the scheduler hands them
out.

A slice is one (layer, window) of all packs in the wave. Their rows form one flat batch, so packs of several
jobs share every base GEMM and every LoRA call; each pack keeps its own cotangent (`Pack.d_hidden`,
overwritten in place) and its own key/value gradient accumulators of the live layer. Cutting the work at any
slice changes nothing but time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft_kernels.attention import AttentionBatch, KeyTarget
from weft_kernels.lora import LoraBatch, LoraDropout, LoraTable
from weft_server.cache.kv import KvCache
from weft_server.model.activations import LayerActivations
from weft_server.model.batch import TokenBatch
from weft_server.model.decoder import Decoder, KeyGradients
from weft_server.training.pack import Pack, PackChunk


@dataclass(frozen=True, slots=True)
class PackPlacement:
    """Where a pack lives on the device: its adapter slot and its `[num_blocks]` int64 block table."""

    pack: Pack
    adapter_slot: int
    block_table: Tensor


@dataclass(frozen=True, slots=True)
class _Window:
    """Consecutive windows of every pack that has the first of them; the same for all layers."""

    spans: tuple[tuple[PackPlacement, int, int], ...]
    chunks: tuple[tuple[PackPlacement, PackChunk], ...]
    batch: TokenBatch


class WindowedBackward:
    """Runs backward slices over a decoder, its cache and its adapter table. The packs of a wave keep their
    activations, or recompute them, all alike."""

    def __init__(self, decoder: Decoder, cache: KvCache, table: LoraTable, *, window_tokens: int) -> None:
        self._decoder = decoder
        self._cache = cache
        self._table = table
        self._window_tokens = window_tokens
        self._windows: dict[tuple[int, tuple[str, ...], range], _Window] = {}
        self._wave_id: int | None = None

    @torch.no_grad()
    def run_slice(
        self,
        wave_id: int,
        placements: Sequence[PackPlacement],
        layer: int,
        windows: range,
        grads: Mapping[int, Tensor],
    ) -> None:
        """Descend consecutive windows through one layer, as one: any cut of a pack is exact.

        Args:
            wave_id: slices of one wave share what does not depend on the layer.
            placements: the packs of the wave that have the first of these windows.
            layer: index of the layer; later layers and, in this layer, later windows are done.
            windows: indices of the windows from the start of the packs, ascending.
            grads: flat gradient of each adapter slot, added to.
        """
        if wave_id != self._wave_id:
            self._windows.clear()
            self._wave_id = wave_id
        key = (wave_id, tuple(placement.pack.pack_id for placement in placements), windows)
        if key not in self._windows:
            self._windows[key] = self._build(placements, windows)
        prepared = self._windows[key]
        d_input = self._decoder.backward_layer(
            layer,
            _gather(prepared, layer),
            torch.cat([_cotangent(p.pack)[first:end] for p, first, end in prepared.spans]),
            prepared.batch,
            self._cache,
            self._table,
            grads,
            self._key_gradients(prepared, layer),
            _kept(prepared, layer),
        )
        row = 0
        for placement, first, end in prepared.spans:
            _cotangent(placement.pack)[first:end] = d_input[row : row + end - first]
            row += end - first

    def forget_packs(self) -> None:
        """Drop what is remembered of the current wave (its packs changed or moved)."""
        self._windows.clear()

    def _build(self, placements: Sequence[PackPlacement], windows: range) -> _Window:
        spans, chunks, lora_runs, slots, row = [], [], [], [], 0
        block_size = self._cache.block_size
        for placement in placements:
            pack = placement.pack
            first = windows.start * self._window_tokens
            end = min(windows.stop * self._window_tokens, pack.num_tokens)
            spans.append((placement, first, end))
            chunks += [
                (placement, chunk)
                for chunk in pack.chunks(first, end, row, placement.block_table, block_size)
            ]
            lora_runs.append((placement.adapter_slot, row, end - first))
            tokens = torch.arange(first, end, device=placement.block_table.device)
            slots.append(placement.block_table[tokens // block_size] * block_size + tokens % block_size)
            row += end - first
        device = self._decoder.device
        attention = AttentionBatch((), [chunk.chunk for _, chunk in chunks])
        batch = TokenBatch(
            positions=torch.cat([p.pack.positions[first:end] for p, first, end in spans]),
            slot_mapping=torch.cat(slots),
            attention=attention,
            lora=LoraBatch.build(lora_runs, device),
            dropout=training_dropout([(p.pack, first, end) for p, first, end in spans], 0, row, device),
        )
        return _Window(tuple(spans), tuple(chunks), batch)

    def _key_gradients(self, prepared: _Window, layer: int) -> KeyGradients:
        shape = (self._decoder.config.num_kv_heads, self._decoder.config.head_dim)
        accumulators, own = {}, []
        for placement, first, end in prepared.spans:
            d_k, d_v = placement.pack.key_gradients(layer, shape)
            accumulators[placement.pack.pack_id] = (d_k, d_v)
            own.append((d_k[first:end], d_v[first:end]))
        targets = [
            KeyTarget(*accumulators[placement.pack.pack_id], chunk.first_key)
            for placement, chunk in prepared.chunks
        ]
        return KeyGradients(targets, own)


def training_dropout(
    spans: Sequence[tuple[Pack, int, int]], first_row: int, num_rows: int, device: torch.device
) -> LoraDropout | None:
    """Dropout of a flat batch of `num_rows` rows whose finetuning spans start at `first_row`, or None if none
    drops."""
    if not any(pack.dropout_p > 0 for pack, _, _ in spans):
        return None
    p = torch.zeros(num_rows, dtype=torch.float32, device=device)
    keys = torch.zeros(num_rows, dtype=torch.int64, device=device)
    row = first_row
    for pack, first, end in spans:
        if pack.dropout_keys is not None:
            p[row : row + end - first] = pack.dropout_p
            keys[row : row + end - first] = pack.dropout_keys[first:end]
        row += end - first
    return LoraDropout(p=p, keys=keys)


def _gather(prepared: _Window, layer: int) -> Tensor:
    inputs = []
    for placement, first, end in prepared.spans:
        stored = placement.pack.layer_inputs
        if stored is None:
            raise RuntimeError(f"pack {placement.pack.pack_id} was not forwarded before its backward")
        inputs.append(stored[layer, first:end])
    return torch.cat(inputs) if len(inputs) > 1 else inputs[0]


def _kept(prepared: _Window, layer: int) -> LayerActivations | None:
    kept = [
        pack.activations[layer, first:end]
        for pack, first, end in ((p.pack, first, end) for p, first, end in prepared.spans)
        if pack.activations is not None
    ]
    if kept and len(kept) != len(prepared.spans):
        raise RuntimeError(f"{len(kept)} of {len(prepared.spans)} packs of one wave keep their activations")
    return LayerActivations.cat(kept) if kept else None


def _cotangent(pack: Pack) -> Tensor:
    if pack.d_hidden is None:
        raise RuntimeError(f"pack {pack.pack_id} has no cotangent: its loss head has not run")
    return pack.d_hidden
