"""Packs: the examples of one optimizer step, concatenated; and the tensors that one pack keeps until its
backward ends.

Packing only partitions a step's examples: attention never crosses examples, positions restart at every
example, and gradients are sums, so how examples are packed changes nothing but speed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft_kernels.attention import AttentionChunk, make_chunk
from weft_kernels.transfer import upload_tensor
from weft_server.model.activations import LayerActivations
from weft_server.model.config import ModelConfig
from weft_server.training.data import IGNORED, Example


def plan_packs(lengths: Sequence[int], max_pack_tokens: int) -> list[list[int]]:
    """Split examples, in order, into packs of at most `max_pack_tokens` tokens (a longer example is alone in
    its pack)."""
    packs: list[list[int]] = []
    room = 0
    for idx, length in enumerate(lengths):
        if not packs or length > room:
            packs.append([])
            room = max_pack_tokens
        packs[-1].append(idx)
        room -= length
    return packs


@dataclass(slots=True)
class Pack:
    """One pack of a job's current step, from its first forward window to the end of its backward.

    `n` is its number of tokens. `token_ids`, `positions` and `labels` are `[n]` int64 on the device; `starts`
    are the first tokens of its examples, with `n` appended; `trained` are the tokens that have a label,
    ascending, and `trained_ids` the same `[num_targets]` int64 on the device. `layer_inputs`
    `[L, n, hidden]`, `d_hidden` `[n, hidden]` (the cotangent at the backward cursor) and, if it keeps them,
    `activations` `[L, at least n, ...]` live from the first window on.
    """

    pack_id: str
    job_id: str
    lines: tuple[int, ...]
    starts: tuple[int, ...]
    token_ids: Tensor
    positions: Tensor
    labels: Tensor
    trained: tuple[int, ...]
    trained_ids: Tensor
    dropout_p: float = 0.0
    dropout_keys: Tensor | None = None
    layer_inputs: Tensor | None = None
    activations: LayerActivations | None = None
    d_hidden: Tensor | None = None
    losses: Tensor | None = None
    correct: Tensor | None = None
    d_keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens in the pack."""
        return self.starts[-1]

    @property
    def num_targets(self) -> int:
        """Tokens that have a label."""
        return len(self.trained)

    def trained_rows(self, first: int, end: int) -> Tensor:
        """The tokens of `[first, end)` that have a label, counted from `first`: int64 on the device."""
        window = slice(bisect_left(self.trained, first), bisect_left(self.trained, end))
        return self.trained_ids[window] - first

    def allocate(self, config: ModelConfig, dtype: torch.dtype) -> None:
        """Take the memory that every pack keeps between forward and backward (idempotent)."""
        device = self.token_ids.device
        if self.layer_inputs is None:
            shape = (config.num_layers, self.num_tokens, config.hidden_size)
            self.layer_inputs = torch.empty(shape, dtype=dtype, device=device)
        if self.d_hidden is None:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            self.d_hidden = torch.zeros((self.num_tokens, config.hidden_size), dtype=dtype, device=device)
            self.losses = torch.zeros(self.num_tokens, dtype=wide, device=device)
            self.correct = torch.zeros(self.num_tokens, dtype=torch.bool, device=device)

    def keep_input(self, layer: int, first: int, rows: Tensor) -> None:
        """Tokens from `first` on enter a layer as `rows` `[m, hidden]`."""
        if self.layer_inputs is not None:
            self.layer_inputs[layer, first : first + len(rows)] = rows

    def keep_activations(self, layer: int, first: int, activations: LayerActivations) -> None:
        """Tokens from `first` on have gone through a layer, which has computed this."""
        if self.activations is not None:
            self.activations[layer, first : first + activations.num_rows].copy_(activations)

    def drop_activations(self) -> LayerActivations | None:
        """Free what it keeps of its layers (at a layer boundary); the cotangent at the cursor, losses and
        seeds stay. Returns the activations that it was given."""
        activations = self.activations
        self.layer_inputs = self.activations = None
        self.d_keys.clear()
        return activations

    def key_gradients(self, layer: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """This layer's key and value gradient accumulators, `[n, Hkv, D]` each: the same two tensors for all
        layers, zeroed when the layer changes."""
        if layer in self.d_keys:
            return self.d_keys[layer]
        if self.d_keys:
            _, accumulators = self.d_keys.popitem()
            for accumulator in accumulators:
                accumulator.zero_()
        else:
            accumulators = self._new_accumulators((self.num_tokens, *shape))
        self.d_keys[layer] = accumulators
        return accumulators

    def _new_accumulators(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if self.d_hidden is None:
            raise RuntimeError(f"pack {self.pack_id} has no backward state")
        wide = torch.float64 if self.d_hidden.dtype == torch.float64 else torch.float32
        device = self.d_hidden.device
        return torch.zeros(shape, dtype=wide, device=device), torch.zeros(shape, dtype=wide, device=device)

    def chunks(
        self, first: int, end: int, row_start: int, block_table: Tensor, block_size: int
    ) -> list[PackChunk]:
        """Attention chunks of tokens `[first, end)` at batch row `row_start`: one per example that they
        touch."""
        chunks = []
        for start, stop in zip(self.starts[:-1], self.starts[1:], strict=True):
            begin, until = max(start, first), min(stop, end)
            if begin < until:
                chunk = make_chunk(
                    row_start + begin - first, until - begin, start, until, block_table, block_size
                )
                chunks.append(PackChunk(chunk, start))
        return chunks

    def loss_by_example(self) -> Tensor:
        """Summed loss of each example, `[examples]` on the device."""
        if self.losses is None:
            raise RuntimeError(f"pack {self.pack_id} has not been forwarded")
        sums = [self.losses[a:b].sum() for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)]
        return torch.stack(sums)


@dataclass(frozen=True, slots=True)
class PackChunk:
    """An attention chunk of a pack and the pack token at which its keys begin."""

    chunk: AttentionChunk
    first_key: int


def make_pack(
    pack_id: str,
    job_id: str,
    examples: Sequence[Example],
    *,
    device: torch.device,
    dropout_p: float = 0.0,
    seed: int = 0,
    step: int = 0,
) -> Pack:
    """Concatenate examples into a pack on `device`."""
    lengths = [len(example.tokens) for example in examples]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    positions = torch.cat([torch.arange(length) for length in lengths])
    keys = None
    if dropout_p > 0:
        example_ids = torch.cat([torch.full((n,), e.idx) for e, n in zip(examples, lengths, strict=True)])
        keys = _dropout_keys(seed, step, example_ids, positions)
        keys = upload_tensor(keys, device)
    labels = torch.cat([example.labels for example in examples])
    trained = (labels != IGNORED).nonzero().squeeze(1)
    return Pack(
        pack_id=pack_id,
        job_id=job_id,
        lines=tuple(example.line for example in examples),
        starts=tuple(starts),
        token_ids=upload_tensor(torch.cat([example.tokens for example in examples]), device),
        positions=upload_tensor(positions, device),
        labels=upload_tensor(labels, device),
        trained=tuple(trained.tolist()),
        trained_ids=upload_tensor(trained, device),
        dropout_p=dropout_p,
        dropout_keys=keys,
    )


def _dropout_keys(seed: int, step: int, example_ids: Tensor, positions: Tensor) -> Tensor:
    """A 63-bit key per token from (job seed, step, example, position), so that recomputation redraws the same
    mask."""
    base = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**62
    mixed = base + example_ids * 0x1F123BB5 * 0x1000003 + positions * 0x5851F42D
    mixed = mixed ^ (mixed >> 31)
    return (mixed * 0x2545F4914F6CDD1D) & 0x7FFF_FFFF_FFFF_FFFF
