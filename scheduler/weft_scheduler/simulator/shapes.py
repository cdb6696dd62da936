"""Shapes of models, and what they make of bytes and floating-point operations.

Facts of published `config.json` files; knows neither devices nor schedules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WEIGHT_BYTES: Mapping[str, float] = {"none": 2.0, "int8": 1.0, "nf4": 0.516}
"""Bytes of one weight of a decoder linear. NF4: 4 bits, and a doubly quantized scale for every 64 weights."""

DENSE_BYTES = 2
"""Bytes of an element that is not quantized: embeddings, head, keys and values, adapters, activations."""

_ELEMENT_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of one decoder: `num_layers` layers of attention and a gated MLP, then the head."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of a layer's linears."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (hidden, q_size),
            "k_proj": (hidden, kv_size),
            "v_proj": (hidden, kv_size),
            "o_proj": (q_size, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's linears."""
        return sum(fan_in * fan_out for fan_in, fan_out in self.modules.values())

    @property
    def decoder_weights(self) -> int:
        """Weights of all layers' linears."""
        return self.num_layers * self.layer_weights

    @property
    def head_weights(self) -> int:
        """Weights of the head."""
        return self.vocab_size * self.hidden_size

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DENSE_BYTES

    @property
    def kept_bytes_per_token(self) -> int:
        """What a finetuning token keeps from its forward to its backward: layer inputs and a cotangent."""
        return (self.num_layers + 1) * self.hidden_size * DENSE_BYTES

    @property
    def activation_bytes_per_token(self) -> int:
        """What a finetuning token keeps besides if the backward is to recompute nothing: queries, keys and
        values, attention's output and its statistics, the residual after it, gate and up.
        """
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        elements = 2 * q_size + 2 * kv_size + self.hidden_size + 2 * self.intermediate_size
        return self.num_layers * (elements * DENSE_BYTES + 4 * self.num_heads)

    def attention_flops(self, products: float) -> float:
        """Scores and weighted values of `products` query-key pairs, in all layers."""
        return 4.0 * self.num_layers * self.num_heads * self.head_dim * products

    def adapter_elements(self, rank: int) -> int:
        """Elements of a LoRA adapter of all linears, packed, every tensor aligned."""

        def aligned(size: int) -> int:
            return -(-size // _ELEMENT_ALIGNMENT) * _ELEMENT_ALIGNMENT

        per_layer = sum(
            aligned(rank * fan_in) + aligned(rank * fan_out) for fan_in, fan_out in self.modules.values()
        )
        return self.num_layers * per_layer

    def weight_bytes(self, quantization: str) -> float:
        """Bytes of the weights held: linears in the format, embeddings and head as they are."""
        return self.decoder_weights * WEIGHT_BYTES[quantization] + 2.0 * self.head_weights * DENSE_BYTES


SHAPES: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("llama-3.2-1b", 128256, 2048, 8192, 16, 32, 8, 64, 131072),
        ModelShape("llama-3.1-8b", 128256, 4096, 14336, 32, 32, 8, 128, 131072),
        ModelShape("llama-3.1-70b", 128256, 8192, 28672, 80, 64, 8, 128, 131072),
        ModelShape("qwen2.5-14b", 152064, 5120, 13824, 48, 40, 8, 128, 32768),
        ModelShape("qwen2.5-32b", 152064, 5120, 27648, 64, 40, 8, 128, 32768),
    )
}
"""Shapes of published models, by name, so that they need no file."""
