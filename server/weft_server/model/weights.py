"""The tensors of one frozen base model, in the shape in which the decoder reads them.

Owns the containers and their accounting. Does not know where weights come from (`loading`, `random`) or what
is computed from them (`decoder`). All tensors lie on one device; nothing in here is ever trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weft_server.model.config import ModelConfig
from weft_server.quant.linear import QuantizedLinear, fuse


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One decoder layer.

    input_norm, post_attention_norm: [hidden] in the compute dtype.
    qkv: q, k and v projections fused along their outputs, [q_size + 2 * kv_size, hidden].
    o: [hidden, q_size].
    gate_up: gate and up projections fused along their outputs, [2 * intermediate, hidden].
    down: [hidden, intermediate].
    q_norm, k_norm: [head_dim], or None for families without them.
    """

    input_norm: Tensor
    post_attention_norm: Tensor
    qkv: QuantizedLinear
    o: QuantizedLinear
    gate_up: QuantizedLinear
    down: QuantizedLinear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    @property
    def linears(self) -> tuple[QuantizedLinear, QuantizedLinear, QuantizedLinear, QuantizedLinear]:
        """qkv, o, gate_up, down."""
        return (self.qkv, self.o, self.gate_up, self.down)

    @property
    def num_bytes(self) -> int:
        """Bytes held by this layer."""
        norms = (self.input_norm, self.post_attention_norm, self.q_norm, self.k_norm)
        return sum(linear.nbytes for linear in self.linears) + sum(n.nbytes for n in norms if n is not None)


@dataclass(frozen=True, slots=True, eq=False)
class DecoderWeights:
    """A whole base model.

    embed: [V, hidden]. norm: [hidden]. lm_head: [V, hidden]; the same tensor object as `embed` when tied.
    dtype: the compute dtype, which is that of every unquantized tensor and of every product.
    """

    config: ModelConfig
    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Tensor
    dtype: torch.dtype
    device: torch.device

    @property
    def num_bytes(self) -> int:
        """Bytes held by the model; a tied embedding counts once."""
        head = 0 if self.lm_head is self.embed else self.lm_head.nbytes
        return self.embed.nbytes + head + self.norm.nbytes + sum(layer.num_bytes for layer in self.layers)


def assemble_layer(
    *,
    input_norm: Tensor,
    post_attention_norm: Tensor,
    linear: Callable[[str], QuantizedLinear],
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> LayerWeights:
    """Builds a layer out of its seven linear modules, fusing those that read the same input.

    Args:
        linear: makes the module of a given name; called once for each, a fused group at a time, so that no
            more than one group exists twice.
    """
    return LayerWeights(
        input_norm=input_norm,
        post_attention_norm=post_attention_norm,
        qkv=fuse([linear("q_proj"), linear("k_proj"), linear("v_proj")]),
        o=linear("o_proj"),
        gate_up=fuse([linear("gate_proj"), linear("up_proj")]),
        down=linear("down_proj"),
        q_norm=q_norm,
        k_norm=k_norm,
    )
