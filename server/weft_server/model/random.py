"""Random weights of any configuration: a model's shape without its knowledge.

Owns the drawing of values, for benchmarks and tests. Formats and fusion are those of `loading`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft_kernels.prepacked import can_prepack
from weft_server.model.config import ModelConfig
from weft_server.model.loading import Quantization, resolve_format
from weft_server.model.weights import DecoderWeights, LayerWeights, assemble_layer
from weft_server.quant.encoding import encode
from weft_server.quant.linear import QuantizedLinear

_INITIAL_STD = 0.02


def random_weights(
    config: ModelConfig,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = "auto",
    low_memory: bool = False,
) -> DecoderWeights:
    """Weights drawn from a normal distribution, quantized as `load_weights` would.

    Matrices have a standard deviation of 0.02, norms lie around 1, biases around 0 (all different from those
    neutral values, so that a test sees when one is left out). The same seed gives the same model on the same
    kind of device.

    Raises:
        ModelError: as `resolve_format`.
    """
    return _RandomModel(config, seed, dtype, device, quantization, low_memory).build()


class _RandomModel:
    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization,
        low_memory: bool,
    ) -> None:
        self._config = config
        self._dtype = dtype
        self._device = device
        self._format = resolve_format(config, quantization)
        self._expanded = device.type == "cpu" and not low_memory
        self._prepacked = can_prepack(device, dtype) and not low_memory
        self._generator = torch.Generator(device).manual_seed(seed)

    def build(self) -> DecoderWeights:
        config = self._config
        embed = self._normal(config.vocab_size, config.hidden_size)
        return DecoderWeights(
            config=config,
            embed=embed,
            layers=tuple(self._layer() for _ in range(config.num_layers)),
            norm=self._norm(config.hidden_size),
            lm_head=embed
            if config.tie_word_embeddings
            else self._normal(config.vocab_size, config.hidden_size),
            dtype=self._dtype,
            device=self._device,
            prepacked=self._prepacked,
        )

    def _layer(self) -> LayerWeights:
        config = self._config
        return assemble_layer(
            input_norm=self._norm(config.hidden_size),
            post_attention_norm=self._norm(config.hidden_size),
            q_norm=self._norm(config.head_dim) if config.qk_norm else None,
            k_norm=self._norm(config.head_dim) if config.qk_norm else None,
            linear=self._linear,
            prepacked=self._prepacked,
        )

    def _linear(self, module: str) -> QuantizedLinear:
        in_features, out_features = self._config.module_shapes[module]
        bias = self._normal(out_features) if self._config.has_bias(module) else None
        weight = self._normal(out_features, in_features)
        return encode(weight, format=self._format, dtype=self._dtype, bias=bias, expanded=self._expanded)

    def _normal(self, *shape: int) -> Tensor:
        values = torch.empty(shape, dtype=self._dtype, device=self._device)
        return values.normal_(std=_INITIAL_STD, generator=self._generator)

    def _norm(self, size: int) -> Tensor:
        return 1.0 + self._normal(size)
