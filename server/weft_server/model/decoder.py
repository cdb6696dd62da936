"""The one decoder of all families: a frozen base with every tenant's adapter added where it applies.

`forward_layer` computes a flat batch through one layer; `backward_layer` is its hand-written vector-Jacobian
product for one window of finetuning rows. The base is frozen, so no linear layer needs its saved input and
the backward recomputes what it needs from the layer's input and the cached keys and values: the down
projection is never recomputed. Weights of adapters are read through the `LoraTable`; their gradients are
added to flat vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels.attention import KeyTarget, attention_backward, paged_attention, windowed_attention
from weft_kernels.lora import LoraTable, lora_backward, lora_forward
from weft_kernels.norm import add_rms_norm, rms_norm, rms_norm_backward
from weft_kernels.rope import HeadNorms, KvSlots, Rotation, rotate_backward, rotate_queries, write_rotated
from weft_kernels.swiglu import swiglu, swiglu_backward
from weft_server.cache.kv import KvCache
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
class _Activations:
    """What the backward of a layer recomputes before it descends, for `T` rows."""

    normed_in: Tensor  # [T, hidden]
    qkv: Tensor  # [T, (H + 2 Hkv) D] before q/k norm and rotation
    q: Tensor  # [T, H, D] rotated
    rotation: Rotation


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
    ) -> Tensor:
        """One layer over a flat batch `[T, hidden]`; writes its keys and values to the cache, then reads
        them. The result goes to `out`, which may be `hidden` itself, if given."""
        weights = self.weights.layers[layer]
        x = self._norm(hidden, weights.input_norm)
        qkv = self._linear(weights.qkv, x, table, layer, QKV, self._qkv_widths, batch)
        slots = KvSlots(cache.keys[layer], cache.values[layer], batch.slot_mapping)
        q = write_rotated(qkv, rotation, self.head_norms(weights), slots)
        context = self._attend(layer, q, batch, cache)
        mid = self._linear(weights.o, context, table, layer, O, (self.config.hidden_size,), batch)
        x = add_rms_norm(mid, hidden, weights.post_attention_norm, self.config.rms_norm_eps)
        gate_up = self._linear(weights.gate_up, x, table, layer, GATE_UP, self._mlp_widths, batch)
        x = swiglu(gate_up)
        down = self._linear(weights.down, x, table, layer, DOWN, (self.config.hidden_size,), batch)
        return down.add_(mid) if out is None else torch.add(down, mid, out=out)

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

        Returns:
            Cotangent of the layer's input `[T, hidden]`.
        """
        weights = self.weights.layers[layer]
        acts = self._recompute_queries(layer, hidden, batch, table)
        out, saved = windowed_attention(
            acts.q,
            cache.keys[layer],
            cache.values[layer],
            batch.attention,
            scale=self.scale,
            sliding_window=self.config.sliding_windows[layer],
        )
        context = out.flatten(1)
        mid = self._linear(weights.o, context, table, layer, O, (self.config.hidden_size,), batch)
        d_mid = self._backward_mlp(layer, mid, hidden, d_out, batch, table, grads)
        d_context = weights.o.input_grad(d_mid)
        if batch.lora is not None:
            widths = (self.config.hidden_size,)
            lora_backward(
                context, d_mid, d_context, grads, table, layer, O, widths, batch.lora, batch.dropout
            )
        d_q = attention_backward(d_context.view_as(acts.q), saved, key_gradients.targets)
        d_k, d_v = _complete_rows(key_gradients)
        d_qkv = rotate_backward(acts.qkv, acts.rotation, self.head_norms(weights), d_q, d_k, d_v)
        d_normed = weights.qkv.input_grad(d_qkv)
        if batch.lora is not None:
            lora_backward(
                acts.normed_in,
                d_qkv,
                d_normed,
                grads,
                table,
                layer,
                QKV,
                self._qkv_widths,
                batch.lora,
                batch.dropout,
            )
        return rms_norm_backward(hidden, weights.input_norm, d_normed, self.config.rms_norm_eps, d_mid)

    def _recompute_queries(
        self, layer: int, hidden: Tensor, batch: TokenBatch, table: LoraTable
    ) -> _Activations:
        weights = self.weights.layers[layer]
        normed = self._norm(hidden, weights.input_norm)
        qkv = self._linear(weights.qkv, normed, table, layer, QKV, self._qkv_widths, batch)
        rotation = self.rotation(batch)
        q = rotate_queries(qkv, rotation, self.head_norms(weights), self.config.num_kv_heads)
        return _Activations(normed, qkv, q, rotation)

    def _backward_mlp(
        self,
        layer: int,
        mid: Tensor,
        residual: Tensor,
        d_out: Tensor,
        batch: TokenBatch,
        table: LoraTable,
        grads: Mapping[int, Tensor],
    ) -> Tensor:
        """Cotangent of the sum of `mid` and `residual` (`mid` is overwritten with it), given the layer's."""
        weights, lora, dropout = self.weights.layers[layer], batch.lora, batch.dropout
        eps = self.config.rms_norm_eps
        normed = add_rms_norm(mid, residual, weights.post_attention_norm, eps)
        gate_up = self._linear(weights.gate_up, normed, table, layer, GATE_UP, self._mlp_widths, batch)
        d_product = weights.down.input_grad(d_out)
        if lora is not None:
            widths = (self.config.hidden_size,)
            product = swiglu(gate_up)
            lora_backward(product, d_out, d_product, grads, table, layer, DOWN, widths, lora, dropout)
        d_gate_up = swiglu_backward(gate_up, d_product)
        d_normed = weights.gate_up.input_grad(d_gate_up)
        if lora is not None:
            lora_backward(
                normed, d_gate_up, d_normed, grads, table, layer, GATE_UP, self._mlp_widths, lora, dropout
            )
        return rms_norm_backward(mid, weights.post_attention_norm, d_normed, eps, d_out)

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

    def _attend(self, layer: int, q: Tensor, batch: TokenBatch, cache: KvCache) -> Tensor:
        context = paged_attention(
            q,
            cache.keys[layer],
            cache.values[layer],
            batch.attention,
            scale=self.scale,
            sliding_window=self.config.sliding_windows[layer],
        )
        return context.flatten(1)


def _complete_rows(key_gradients: KeyGradients) -> tuple[Tensor, Tensor]:
    """Complete key and value gradients of the window's rows, `[T, Hkv, D]` each, in the accumulators'
    dtype."""
    if len(key_gradients.own) == 1:
        return key_gradients.own[0]
    d_k, d_v = zip(*key_gradients.own, strict=True)
    return torch.cat(d_k), torch.cat(d_v)
