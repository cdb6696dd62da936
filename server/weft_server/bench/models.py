"""Random models and adapters: the same weights for Weft, for its peers and for a checkpoint on disk.

Weft's own come from `weft_server.model.random`, as everywhere; here they get the names of a checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft_server.adapters.packed import PackedAdapter, new_adapter, repack
from weft_server.adapters.paths import MODULE_GROUPS, MODULES, module_path
from weft_server.bench.shapes import Shape
from weft_server.model.config import ModelConfig
from weft_server.model.loading import Quantization
from weft_server.model.random import random_weights
from weft_server.model.weights import DecoderWeights
from weft_server.quant.linear import QuantizedLinear

_LORA_B_STD = 0.05
"""Large enough that another adapter's answer is far beyond a check's tolerance."""


class RandomModel:
    """One model: a function of shape, seed, dtype and kind of device. Nothing is kept: weights are drawn anew
    whenever they are asked for.
    """

    def __init__(self, shape: Shape, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.shape = shape
        self.config: ModelConfig = shape.config
        self.dtype = dtype
        self.device = device
        self._seed = seed

    def weft_weights(self, quantization: Quantization, *, low_memory: bool = False) -> DecoderWeights:
        """As Weft's decoder takes them: quantized and laid out as `load_weights` would.

        Raises:
            ModelError: as `resolve_format`.
        """
        return random_weights(
            self.config,
            seed=self._seed,
            dtype=self.dtype,
            device=self.device,
            quantization=quantization,
            low_memory=low_memory,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The unquantized model by the names of a checkpoint (`model.layers.0.mlp.up_proj.weight`).

        All of it at once, in `dtype`; modules that Weft fuses are views of one tensor.
        """
        weights = self.weft_weights("none", low_memory=True)
        named = {"model.embed_tokens.weight": weights.embed, "model.norm.weight": weights.norm}
        for idx, layer in enumerate(weights.layers):
            prefix = f"model.layers.{idx}"
            named[f"{prefix}.input_layernorm.weight"] = layer.input_norm
            named[f"{prefix}.post_attention_layernorm.weight"] = layer.post_attention_norm
            if layer.q_norm is not None and layer.k_norm is not None:
                named[f"{prefix}.self_attn.q_norm.weight"] = layer.q_norm
                named[f"{prefix}.self_attn.k_norm.weight"] = layer.k_norm
            for group, linear in zip(MODULE_GROUPS, layer.linears, strict=True):
                named |= self._parts(idx, group, linear)
        if not self.config.tie_word_embeddings:
            named["lm_head.weight"] = weights.lm_head
        return named

    def adapter(self, seed: int, rank: int = 16, modules: tuple[str, ...] = MODULES) -> PackedAdapter:
        """An adapter in fp32 whose B is not zero, alpha twice the rank."""
        fresh = new_adapter(
            rank=rank,
            alpha=2.0 * rank,
            dropout=0.0,
            target_modules=modules,
            use_rslora=False,
            num_layers=self.config.num_layers,
            shapes=self.config.module_shapes,
            seed=seed,
        )
        generator = torch.Generator().manual_seed(seed + 1)
        weights = fresh.weights.clone()
        for entry in fresh.layout:
            lora_b = fresh.layout.b(weights, entry.layer, entry.module)
            lora_b.normal_(std=_LORA_B_STD, generator=generator)
        return repack(fresh, weights)

    def _parts(self, layer: int, group: tuple[str, ...], linear: QuantizedLinear) -> dict[str, Tensor]:
        """Weights and biases of the modules that a fused linear layer computes side by side."""
        sizes = [self.config.module_shapes[module][1] for module in group]
        parts: dict[str, Tensor] = {}
        for module, weight in zip(group, torch.split(linear.weight_dense(), sizes), strict=True):
            parts[f"{module_path(layer, module)}.weight"] = weight
        if linear.bias is not None:
            for module, bias in zip(group, torch.split(linear.bias, sizes), strict=True):
                if self.config.has_bias(module):
                    parts[f"{module_path(layer, module)}.bias"] = bias
        return parts
