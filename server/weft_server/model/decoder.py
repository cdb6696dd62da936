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

from weft_kernels.attention import Vjp, chunk_vjp, gather_keys, paged_attention
from weft_kernels.lora import LoraTable, lora_backward, lora_forward
from weft_server.cache.kv import KvCache
from weft_server.model.batch import TokenBatch
from weft_server.model.rope import RotaryTable, apply_rope
from weft_server.model.weights import DecoderWeights, LayerWeights
from weft_server.quant.linear import QuantizedLinear

QKV, O, GATE_UP, DOWN = (0, 1, 2), (3,), (4, 5), (6,)  # noqa: E741 - the field's name of the output projection


@dataclass(frozen=True, slots=True)
class KeyGradients:
    """Accumulators of one pack's key and value gradients in the live layer, `[pack tokens, Hkv, D]` each,
    fp32 or wider.

    Chunk `i` of the window's attention batch adds to `[first_key[i], first_key[i] + num_keys)`; `rows` are
    the pack's own tokens in the window: the ones whose accumulated gradient is complete once this window's
    chunks have added.
    """

    d_k: Tensor
    d_v: Tensor
    rows: slice


@dataclass(frozen=True, slots=True)
class ChunkKeys:
    """Where a chunk's key gradients go: which accumulators, from which pack token on."""

    gradients: KeyGradients
    first_key: int


@dataclass(frozen=True, slots=True)
class _Activations:
    """What the backward of a layer recomputes before it descends, for `T` rows."""

    normed_in: Tensor  # [T, hidden]
    qk_raw: Tensor  # [T, H + Hkv, D] before q/k norm and rotation
    q: Tensor  # [T, H, D] rotated
    cos: Tensor
    sin: Tensor


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

    def rotation(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """`(cos, sin)` of a batch: computed once, used by all layers."""
        return self.rotary.at(batch.positions)

    def forward_layer(
        self,
        layer: int,
        hidden: Tensor,
        batch: TokenBatch,
        cache: KvCache,
        table: LoraTable,
        rotation: tuple[Tensor, Tensor],
    ) -> Tensor:
        """One layer over a flat batch `[T, hidden]`; writes its keys and values to the cache, then reads
        them."""
        weights = self.weights.layers[layer]
        x = self._norm(hidden, weights.input_norm)
        qkv = self._linear(weights.qkv, x, table, layer, QKV, self._qkv_widths, batch)
        qk_raw, v = self._split_qkv(qkv)
        q, k = self._rotate(weights, qk_raw, *rotation)
        cache.write(layer, batch.slot_mapping, k, v)
        context = self._attend(layer, q, batch, cache)
        hidden = hidden + self._linear(weights.o, context, table, layer, O, (self.config.hidden_size,), batch)
        x = self._norm(hidden, weights.post_attention_norm)
        gate_up = self._linear(weights.gate_up, x, table, layer, GATE_UP, self._mlp_widths, batch)
        gate, up = gate_up.chunk(2, dim=-1)
        x = F.silu(gate) * up
        return hidden + self._linear(weights.down, x, table, layer, DOWN, (self.config.hidden_size,), batch)

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
        chunk_keys: Sequence[ChunkKeys],
    ) -> Tensor:
        """Vector-Jacobian product of one layer for one window of finetuning rows.

        Later windows of the same packs must have been through this layer already: they have added the
        gradients of the keys and values that they read.

        Args:
            hidden: the layer's input `[T, hidden]`.
            d_out: cotangent of the layer's output `[T, hidden]`.
            batch: the rows; its attention has one chunk per entry of `chunk_keys` and no decode rows.
            grads: flat gradient of each adapter slot, added to.
            chunk_keys: where each chunk's key gradients accumulate.

        Returns:
            Cotangent of the layer's input `[T, hidden]`.
        """
        weights = self.weights.layers[layer]
        acts = self._recompute_queries(layer, hidden, batch, table)
        context, vjps = self._attend_with_vjp(layer, acts.q, batch, cache)
        mid = hidden + self._linear(weights.o, context, table, layer, O, (self.config.hidden_size,), batch)
        d_mid = d_out + self._backward_mlp(layer, mid, d_out, batch, table, grads)
        d_context = weights.o.input_grad(d_mid)
        if batch.lora is not None:
            widths = (self.config.hidden_size,)
            lora_backward(
                context, d_mid, d_context, grads, table, layer, O, widths, batch.lora, batch.dropout
            )
        d_q = self._backward_attention(d_context.view_as(acts.q), vjps, batch, chunk_keys)
        d_qkv = self._backward_rotation(weights, acts, d_q, _complete_rows(chunk_keys, self.dtype))
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
        return d_mid + rms_norm_backward(hidden, weights.input_norm, d_normed, self.config.rms_norm_eps)

    def _recompute_queries(
        self, layer: int, hidden: Tensor, batch: TokenBatch, table: LoraTable
    ) -> _Activations:
        weights = self.weights.layers[layer]
        normed = self._norm(hidden, weights.input_norm)
        qkv = self._linear(weights.qkv, normed, table, layer, QKV, self._qkv_widths, batch)
        qk_raw, _ = self._split_qkv(qkv)
        cos, sin = self.rotation(batch)
        q, _ = self._rotate(weights, qk_raw, cos, sin)
        return _Activations(normed, qk_raw, q, cos, sin)

    def _backward_mlp(
        self,
        layer: int,
        mid: Tensor,
        d_out: Tensor,
        batch: TokenBatch,
        table: LoraTable,
        grads: Mapping[int, Tensor],
    ) -> Tensor:
        weights, lora, dropout = self.weights.layers[layer], batch.lora, batch.dropout
        normed = self._norm(mid, weights.post_attention_norm)
        gate_up = self._linear(weights.gate_up, normed, table, layer, GATE_UP, self._mlp_widths, batch)
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        d_product = weights.down.input_grad(d_out)
        if lora is not None:
            widths = (self.config.hidden_size,)
            lora_backward(activated * up, d_out, d_product, grads, table, layer, DOWN, widths, lora, dropout)
        d_gate = torch.ops.aten.silu_backward(d_product * up, gate)
        d_gate_up = torch.cat((d_gate, d_product * activated), dim=-1)
        d_normed = weights.gate_up.input_grad(d_gate_up)
        if lora is not None:
            lora_backward(
                normed, d_gate_up, d_normed, grads, table, layer, GATE_UP, self._mlp_widths, lora, dropout
            )
        return rms_norm_backward(mid, weights.post_attention_norm, d_normed, self.config.rms_norm_eps)

    def _attend_with_vjp(
        self, layer: int, q: Tensor, batch: TokenBatch, cache: KvCache
    ) -> tuple[Tensor, list[Vjp]]:
        outputs, vjps = [], []
        for chunk in batch.attention.chunks:
            k, v = gather_keys(cache.keys[layer], cache.values[layer], chunk)
            rows = q[chunk.row_start : chunk.row_start + chunk.num_tokens]
            window = self.config.sliding_windows[layer]
            out, vjp = chunk_vjp(rows, k, v, chunk, scale=self.scale, sliding_window=window)
            outputs.append(out)
            vjps.append(vjp)
        return torch.cat(outputs).flatten(1), vjps

    def _backward_attention(
        self, d_context: Tensor, vjps: Sequence[Vjp], batch: TokenBatch, chunk_keys: Sequence[ChunkKeys]
    ) -> Tensor:
        d_q = []
        for chunk, vjp, target in zip(batch.attention.chunks, vjps, chunk_keys, strict=True):
            d_q_rows, d_k, d_v = vjp(d_context[chunk.row_start : chunk.row_start + chunk.num_tokens])
            keys = slice(target.first_key, target.first_key + chunk.num_keys)
            target.gradients.d_k[keys] += d_k
            target.gradients.d_v[keys] += d_v
            d_q.append(d_q_rows)
        return torch.cat(d_q)

    def _backward_rotation(
        self, weights: LayerWeights, acts: _Activations, d_q: Tensor, d_kv: tuple[Tensor, Tensor]
    ) -> Tensor:
        d_k, d_v = d_kv
        d_qk = apply_rope(torch.cat((d_q, d_k), dim=1), acts.cos, -acts.sin)
        if weights.q_norm is not None and weights.k_norm is not None:
            heads, eps = self.config.num_heads, self.config.rms_norm_eps
            d_qk = torch.cat(
                (
                    rms_norm_backward(acts.qk_raw[:, :heads], weights.q_norm, d_qk[:, :heads], eps),
                    rms_norm_backward(acts.qk_raw[:, heads:], weights.k_norm, d_qk[:, heads:], eps),
                ),
                dim=1,
            )
        return torch.cat((d_qk.flatten(1), d_v.flatten(1)), dim=1)

    # ------------------------------------------------------------ parts

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

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

    def _split_qkv(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        head_dim = self.config.head_dim
        num_rows, width = len(qkv), self._q_size + self._kv_size
        return qkv[:, :width].view(num_rows, -1, head_dim), qkv[:, width:].view(num_rows, -1, head_dim)

    def _rotate(self, weights: LayerWeights, qk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.config.num_heads
        if weights.q_norm is not None and weights.k_norm is not None:
            qk = torch.cat(
                (self._norm(qk[:, :heads], weights.q_norm), self._norm(qk[:, heads:], weights.k_norm)), dim=1
            )
        qk = apply_rope(qk, cos, sin)
        return qk[:, :heads], qk[:, heads:]

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


def _complete_rows(chunk_keys: Sequence[ChunkKeys], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Complete key and value gradients of the window's rows, `[T, Hkv, D]` each, pack after pack."""
    packs = list({id(target.gradients): target.gradients for target in chunk_keys}.values())
    d_k = torch.cat([pack.d_k[pack.rows] for pack in packs])
    d_v = torch.cat([pack.d_v[pack.rows] for pack in packs])
    return d_k.to(dtype), d_v.to(dtype)


def rms_norm_backward(x: Tensor, weight: Tensor, d_y: Tensor, eps: float) -> Tensor:
    """Cotangent of `x` for `y = weight · x / sqrt(mean(x²) + eps)` over the last axis; fp32 inside (fp64
    stays fp64)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_wide, d_hat = x.to(wide), d_y.to(wide) * weight.to(wide)
    inverse = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    x_hat = x_wide * inverse
    d_x = inverse * (d_hat - x_hat * (d_hat * x_hat).mean(-1, keepdim=True))
    return d_x.to(x.dtype)
