"""The tensors of one frozen base model, in the shape in which the decoder reads them.

Owns the containers and their accounting. Does not know where weights come from (`loading`, `random`) or what
is computed from them (`decoder`). All tensors lie on one device; nothing in here is ever trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

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
    prepacked: lay the head out for the CPU's GEMM, beside `lm_head`, as `assemble_layer` does the layers.
    head: the linear layer of `lm_head`.
    """

    config: ModelConfig
    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Tensor
    dtype: torch.dtype
    device: torch.device
    prepacked: bool = False
    head: QuantizedLinear = field(init=False)

    def __post_init__(self) -> None:
        head = QuantizedLinear(self.lm_head, dtype=self.dtype)
        if self.prepacked:
            head.prepack()
            head.forgo_grad_layout()  # the loss head multiplies `lm_head` itself
        object.__setattr__(self, "head", head)

    @property
    def linears(self) -> Iterator[QuantizedLinear]:
        """Every linear layer of the model, the head last."""
        for layer in self.layers:
            yield from layer.linears
        yield self.head

    @property
    def num_bytes(self) -> int:
        """Bytes held by the model; a tied embedding counts once."""
        matrices = [self.embed] if self.lm_head is self.embed else [self.embed, self.lm_head]
        laid_out = self.head.nbytes if self.prepacked else 0
        held = sum(tensor.nbytes for tensor in (*matrices, self.norm))
        return held + laid_out + sum(layer.num_bytes for layer in self.layers)

    @property
    def deferred_bytes(self) -> int:
        """Bytes that the first backward pass is going to take for good (`QuantizedLinear.prepack`)."""
        return sum(linear.deferred_nbytes for linear in self.linears)

    def forgo_grad_layouts(self) -> None:
        """Make `deferred_bytes` zero, at the price of slower finetuning."""
        for linear in self.linears:
            linear.forgo_grad_layout()


def assemble_layer(
    *,
    input_norm: Tensor,
    post_attention_norm: Tensor,
    linear: Callable[[str], QuantizedLinear],
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    prepacked: bool = False,
) -> LayerWeights:
    """Builds a layer out of its seven linear modules, fusing those that read the same input.

    Args:
        linear: makes the module of a given name; called once for each, a fused group at a time, so that no
            more than one group exists twice.
        prepacked: lay dense modules out for the CPU's GEMM.
    """

    def group(*names: str) -> QuantizedLinear:
        fused = fuse([linear(name) for name in names])
        if prepacked:
            fused.prepack()
        return fused

    return LayerWeights(
        input_norm=input_norm,
        post_attention_norm=post_attention_norm,
        qkv=group("q_proj", "k_proj", "v_proj"),
        o=group("o_proj"),
        gate_up=group("gate_proj", "up_proj"),
        down=group("down_proj"),
        q_norm=q_norm,
        k_norm=k_norm,
    )
