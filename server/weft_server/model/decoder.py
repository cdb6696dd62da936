"""The one decoder of all families: a frozen base with every tenant's adapter added where it applies.

`forward_layer` computes a flat batch through one layer; `backward_layer` is its hand-written vector-Jacobian
product for one window of finetuning rows. The base is frozen, so no linear layer needs its saved input. What
the backward needs, the forward returned (`LayerActivations`); where it was not kept, it is recomputed from
the layer's input and the cached keys and values: the down projection never is. Weights of adapters are read
through the `LoraTable`; their gradients are added to flat vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels.attention import KeyTarget, SavedAttention, attention_backward, paged_attention
from weft_kernels.lora import LoraTable, lora_backward, lora_forward
from weft_kernels.norm import add_rms_norm, rms_norm, rms_norm_backward
from weft_kernels.rope import HeadNorms, KvSlots, Rotation, rotate_backward, rotate_queries, write_rotated
from weft_kernels.swiglu import swiglu, swiglu_backward
from weft_server.cache.kv import KvCache
from weft_server.model.activations import LayerActivations
from weft_server.model.batch import TokenBatch
from weft_server.model.rope import RotaryTable
from weft_server.model.weights import DecoderWeights, LayerWeights
from weft_server.quant.linear import QuantizedLinear

QKV, O, GATE_UP, DOWN = (0, 1, 2), (3,), (4, 5), (6,)  # noqa: E741 - the field's name of the output projection


@dataclass(frozen=True, slots=True)
class KeyGradients:
    """Accumulators of key and value gradients in the live layer, for one window.

    `targets` says where each chunk of the window's attention batch adds. `own` are the accumulators of the
    window's own rows, `[n, Hkv, D]` of keys and of values, pack after pack: complete once the window's chunks
    have added.
    """

    targets: Sequence[KeyTarget]
    own: Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class _AdapterBackward:
    """The adapters' part of one layer's backward."""

    layer: int
    batch: TokenBatch
    table: LoraTable
    grads: Mapping[int, Tensor]

    def add(
        self, x: Tensor, d_y: Tensor, d_x: Tensor, modules: tuple[int, ...], widths: tuple[int, ...]
    ) -> None:
        """Of modules with input `x`, given the cotangent `d_y`: to the gradients, and to `d_x`."""
        lora, dropout = self.batch.lora, self.batch.dropout
        if lora is not None:
            lora_backward(x, d_y, d_x, self.grads, self.table, self.layer, modules, widths, lora, dropout)


class Decoder:
    """A decoder-only transformer over frozen weights, a paged cache and an adapter table."""

    def __init__(self, weights: DecoderWeights, *, max_positions: int) -> None:
        self.weights = weights
        self.config = weights.config
        self.dtype = weights.dtype
        self.device = weights.device
        self.rotary = RotaryTable(
            self.config, max_positions=max_positions, dtype=self.dtype, device=self.device
        )
        config = self.config
        self.scale = config.head_dim**-0.5
        self._q_size = config.num_heads * config.head_dim
        self._kv_size = config.num_kv_heads * config.head_dim
        self._qkv_widths = (self._q_size, self._kv_size, self._kv_size)
        self._mlp_widths = (config.intermediate_size, config.intermediate_size)

    # ------------------------------------------------------------ forward

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids `[T]` to hidden states `[T, hidden]`."""
        return F.embedding(token_ids, self.weights.embed)

    def rotation(self, batch: TokenBatch) -> Rotation:
        """Rotation of a batch's positions: computed once, used by all layers."""
        return self.rotary.at(batch.positions)

    def forward_layer(
        self,
        layer: int,
        hidden: Tensor,
        batch: TokenBatch,
        cache: KvCache,
        table: LoraTable,
        rotation: Rotation,
        out: Tensor | None = None,
    ) -> tuple[Tensor, LayerActivations]:
        """One layer over a flat batch `[T, hidden]`; writes its keys and values to the cache, then reads
        them. Returns its output `[T, hidden]`, and what led to it. The output goes to `out`, which may be
        `hidden` itself, if given."""
        weights = self.weights.layers[layer]
        qkv = self._project(layer, hidden, batch, table)
        slots = KvSlots(cache.keys[layer], cache.values[layer], batch.slot_mapping)
        q = write_rotated(qkv, rotation, self.head_norms(weights), slots)
        acts = self._attend(layer, hidden, qkv, q, batch, cache, table)
        product = swiglu(acts.gate_up)
        down = self._linear(weights.down, product, table, layer, DOWN, (self.config.hidden_size,), batch)
        output = down.add_(acts.mid) if out is None else torch.add(down, acts.mid, out=out)
        return output, acts

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: `[T, hidden]` to `[T, vocab]` in the compute dtype."""
        return self.weights.head.forward(self._norm(hidden, self.weights.norm))

    # ------------------------------------------------------------ backward

    def backward_layer(
        self,
        layer: int,
        hidden: Tensor,
        d_out: Tensor,
        batch: TokenBatch,
        cache: KvCache,
        table: LoraTable,
        grads: Mapping[int, Tensor],
        key_gradients: KeyGradients,
        kept: LayerActivations | None = None,
    ) -> Tensor:
        """Vector-Jacobian product of one layer for one window of finetuning rows.

        Later windows of the same packs must have been through this layer already: they have added the
        gradients of the keys and values that they read.

        Args:
            hidden: the layer's input `[T, hidden]`.
            d_out: cotangent of the layer's output `[T, hidden]`.
            batch: the rows, without decode rows.
            grads: flat gradient of each adapter slot, added to.
            key_gradients: where the gradients of keys and values accumulate.
            kept: what the forward returned for these rows; None recomputes it.

        Returns:
            Cotangent of the layer's input `[T, hidden]`.
        """
        weights = self.weights.layers[layer]
        rotation = self.rotation(batch)
        acts = self._recompute(layer, hidden, batch, cache, table, rotation) if kept is None else kept
        adapters = _AdapterBackward(layer, batch, table, grads)
        d_mid = self._backward_mlp(weights, acts, d_out, adapters)
        d_context = weights.o.input_grad(d_mid)
        adapters.add(acts.context.flatten(1), d_mid, d_context, O, (self.config.hidden_size,))
        d_q = attention_backward(
            d_context.view_as(acts.context),
            self._saved_attention(layer, acts, batch, cache, rotation),
            key_gradients.targets,
        )
        d_k, d_v = _complete_rows(key_gradients)
        d_qkv = rotate_backward(acts.qkv, rotation, self.head_norms(weights), d_q, d_k, d_v)
        d_normed = weights.qkv.input_grad(d_qkv)
        normed = self._norm(hidden, weights.input_norm)
        adapters.add(normed, d_qkv, d_normed, QKV, self._qkv_widths)
        return rms_norm_backward(hidden, weights.input_norm, d_normed, self.config.rms_norm_eps, d_mid)

    def _recompute(
        self,
        layer: int,
        hidden: Tensor,
        batch: TokenBatch,
        cache: KvCache,
        table: LoraTable,
        rotation: Rotation,
    ) -> LayerActivations:
        qkv = self._project(layer, hidden, batch, table)
        norms = self.head_norms(self.weights.layers[layer])
        q = rotate_queries(qkv, rotation, norms, self.config.num_kv_heads)
        return self._attend(layer, hidden, qkv, q, batch, cache, table)

    def _saved_attention(
        self, layer: int, acts: LayerActivations, batch: TokenBatch, cache: KvCache, rotation: Rotation
    ) -> SavedAttention:
        norms = self.head_norms(self.weights.layers[layer])
        return SavedAttention(
            rotate_queries(acts.qkv, rotation, norms, self.config.num_kv_heads),
            cache.keys[layer],
            cache.values[layer],
            batch.attention,
            self.scale,
            self.config.sliding_windows[layer],
            acts.context,
            acts.stats,
        )

    def _backward_mlp(
        self, weights: LayerWeights, acts: LayerActivations, d_out: Tensor, adapters: _AdapterBackward
    ) -> Tensor:
        """Cotangent of the residual after attention, given that of the layer's output."""
        eps = self.config.rms_norm_eps
        d_product = weights.down.input_grad(d_out)
        adapters.add(swiglu(acts.gate_up), d_out, d_product, DOWN, (self.config.hidden_size,))
        d_gate_up = swiglu_backward(acts.gate_up, d_product)
        d_normed = weights.gate_up.input_grad(d_gate_up)
        normed = self._norm(acts.mid, weights.post_attention_norm)
        adapters.add(normed, d_gate_up, d_normed, GATE_UP, self._mlp_widths)
        return rms_norm_backward(acts.mid, weights.post_attention_norm, d_normed, eps, d_out)

    # ------------------------------------------------------------ parts

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.config.rms_norm_eps)

    def _linear(
        self,
        linear: QuantizedLinear,
        x: Tensor,
        table: LoraTable,
        layer: int,
        modules: tuple[int, ...],
        widths: tuple[int, ...],
        batch: TokenBatch,
    ) -> Tensor:
        y = linear.forward(x)
        if batch.lora is not None:
            lora_forward(x, y, table, layer, modules, widths, batch.lora, batch.dropout)
        return y

    def head_norms(self, weights: LayerWeights) -> HeadNorms | None:
        """The norms of a layer's query and key heads, in families that have them."""
        if weights.q_norm is None or weights.k_norm is None:
            return None
        return HeadNorms(weights.q_norm, weights.k_norm, self.config.rms_norm_eps)

    def _project(self, layer: int, hidden: Tensor, batch: TokenBatch, table: LoraTable) -> Tensor:
        weights = self.weights.layers[layer]
        normed = self._norm(hidden, weights.input_norm)
        return self._linear(weights.qkv, normed, table, layer, QKV, self._qkv_widths, batch)

    def _attend(
        self,
        layer: int,
        hidden: Tensor,
        qkv: Tensor,
        q: Tensor,
        batch: TokenBatch,
        cache: KvCache,
        table: LoraTable,
    ) -> LayerActivations:
        """From rotated queries to gate and up."""
        weights, config = self.weights.layers[layer], self.config
        stats = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        context = paged_attention(
            q,
            cache.keys[layer],
            cache.values[layer],
            batch.attention,
            scale=self.scale,
            sliding_window=config.sliding_windows[layer],
            stats=stats,
        )
        mid = self._linear(weights.o, context.flatten(1), table, layer, O, (config.hidden_size,), batch)
        x = add_rms_norm(mid, hidden, weights.post_attention_norm, config.rms_norm_eps)
        gate_up = self._linear(weights.gate_up, x, table, layer, GATE_UP, self._mlp_widths, batch)
        return LayerActivations(qkv, context, stats, mid, gate_up)


def _complete_rows(key_gradients: KeyGradients) -> tuple[Tensor, Tensor]:
    """Complete key and value gradients of the window's rows, `[T, Hkv, D]` each, in the accumulators'
    dtype."""
    if len(key_gradients.own) == 1:
        return key_gradients.own[0]
    d_k, d_v = zip(*key_gradients.own, strict=True)
    return torch.cat(d_k), torch.cat(d_v)
