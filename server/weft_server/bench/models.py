"""Random weights by name, so that Weft, its peers and a checkpoint on disk hold the very same ones.

Owns the drawing and Weft's form of it, and the adapters. The peers' form is `peers`'.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from weft_server.adapters.packed import PackedAdapter, new_adapter, repack
from weft_server.adapters.paths import MODULES, module_path
from weft_server.bench.shapes import Shape
from weft_server.model.config import ModelConfig
from weft_server.model.loading import Quantization, resolve_format
from weft_server.model.weights import DecoderWeights, assemble_layer
from weft_server.quant.encoding import encode
from weft_server.quant.linear import QuantizedLinear

_WEIGHT_STD = 0.02
_LORA_B_STD = 0.05
"""Large enough that another adapter's answer is far beyond a check's tolerance."""


class RandomModel:
    """The tensors of one model, each a function of the seed, its name in a checkpoint and the kind of device.

    Nothing is kept: a tensor is drawn anew whenever it is asked for.
    """

    def __init__(self, shape: Shape, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.shape = shape
        self.config: ModelConfig = shape.config
        self.dtype = dtype
        self.device = device
        self._seed = seed

    def tensor(self, name: str) -> Tensor:
        """The tensor that a checkpoint holds under this name (`model.layers.0.mlp.up_proj.weight`)."""
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        values = torch.empty(self._size(name), dtype=self.dtype, device=self.device)
        values.normal_(std=_WEIGHT_STD, generator=generator)
        return values.add_(1.0) if name.rpartition(".")[0].endswith("norm") else values

    def names(self) -> Iterator[str]:
        """Names of all tensors of the checkpoint."""
        yield "model.embed_tokens.weight"
        for layer in range(self.config.num_layers):
            prefix = f"model.layers.{layer}"
            yield from (f"{prefix}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm"))
            if self.config.qk_norm:
                yield from (f"{prefix}.self_attn.{norm}.weight" for norm in ("q_norm", "k_norm"))
            for module in MODULES:
                yield f"{module_path(layer, module)}.weight"
                if self.config.has_bias(module):
                    yield f"{module_path(layer, module)}.bias"
        yield "model.norm.weight"
        if not self.config.tie_word_embeddings:
            yield "lm_head.weight"

    def weft_weights(self, quantization: Quantization, *, low_memory: bool = False) -> DecoderWeights:
        """As Weft's decoder takes them, quantized as `load_weights` would.

        Raises:
            ModelError: as `resolve_format`.
        """
        layers = tuple(
            assemble_layer(
                input_norm=self.tensor(f"model.layers.{layer}.input_layernorm.weight"),
                post_attention_norm=self.tensor(f"model.layers.{layer}.post_attention_layernorm.weight"),
                q_norm=self.tensor(f"model.layers.{layer}.self_attn.q_norm.weight")
                if self.config.qk_norm
                else None,
                k_norm=self.tensor(f"model.layers.{layer}.self_attn.k_norm.weight")
                if self.config.qk_norm
                else None,
                linear=lambda module, layer=layer: self._linear(layer, module, quantization, low_memory),  # type: ignore[misc]
            )
            for layer in range(self.config.num_layers)
        )
        embed = self.tensor("model.embed_tokens.weight")
        return DecoderWeights(
            config=self.config,
            embed=embed,
            layers=layers,
            norm=self.tensor("model.norm.weight"),
            lm_head=embed if self.config.tie_word_embeddings else self.tensor("lm_head.weight"),
            dtype=self.dtype,
            device=self.device,
        )

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

    def _linear(
        self, layer: int, module: str, quantization: Quantization, low_memory: bool
    ) -> QuantizedLinear:
        name = module_path(layer, module)
        return encode(
            self.tensor(f"{name}.weight"),
            format=resolve_format(self.config, quantization),
            dtype=self.dtype,
            bias=self.tensor(f"{name}.bias") if self.config.has_bias(module) else None,
            expanded=self.device.type == "cpu" and not low_memory,
        )

    def _size(self, name: str) -> tuple[int, ...]:
        path, _, kind = name.rpartition(".")
        owner = path.rpartition(".")[2]
        if owner in MODULES:
            in_features, out_features = self.config.module_shapes[owner]
            return (out_features, in_features) if kind == "weight" else (out_features,)
        if owner in ("embed_tokens", "lm_head"):
            return (self.config.vocab_size, self.config.hidden_size)
        return (self.config.head_dim if owner in ("q_norm", "k_norm") else self.config.hidden_size,)
