"""From a Hugging Face model directory to DecoderWeights.

Owns the names of a checkpoint's tensors, the check that exactly the expected ones are there, and the format
in which each linear layer ends up. Tensors are read one at a time, so that the memory peak is the result plus
one tensor. Reading files belongs to `checkpoint`, bitsandbytes' layout to `prequantized`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from weft_kernels.prepacked import can_prepack
from weft_server.model.checkpoint import Checkpoint, open_checkpoint
from weft_server.model.config import MODULES, ModelConfig, ModelError
from weft_server.model.fingerprint import base_fingerprint
from weft_server.model.prequantized import check_quantization_config, is_quantized, part_names, read_nf4
from weft_server.model.weights import DecoderWeights, LayerWeights, assemble_layer
from weft_server.quant.encoding import encode
from weft_server.quant.linear import Format, QuantizedLinear

__all__ = ["ModelError", "Quantization", "base_fingerprint", "load_weights", "resolve_format"]

Quantization = Literal["auto", "nf4", "int8", "none"]

_EMBED, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_MODULE_PATHS: Mapping[str, str] = {
    module: ("mlp." if module in ("gate_proj", "up_proj", "down_proj") else "self_attn.") + module
    for module in MODULES
}
# Buffers that old checkpoints stored and that are computed from config.json instead.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MAX_NAMES_SHOWN = 5


def load_weights(
    path: Path | str,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization = "auto",
    low_memory: bool = False,
) -> DecoderWeights:
    """Loads the weights of a model directory.

    Args:
        path: a directory with `model.safetensors`, or shards and their index.
        config: that directory's configuration.
        device: where all weights go.
        dtype: the compute dtype: of embeddings, norms, head, biases and unquantized or expanded linears.
        quantization: the format of the decoder's linear layers; "auto" is the checkpoint's own, else nf4. A
            pre-quantized checkpoint given "none" is expanded for good. Modules that a pre-quantized
            checkpoint leaves unquantized stay so.
        low_memory: on a CPU, keep quantized weights packed and dequantize at each use, instead of expanding
            them once to `dtype` (the same values), and lay no dense weight out for the library's GEMM.

    Raises:
        ModelError: missing, unexpected, mis-shaped or non-finite tensors (named), unreadable files, or a
            quantization that does not go with the checkpoint's.
    """
    weight_format = resolve_format(config, quantization)
    prepacked = can_prepack(device, dtype) and not low_memory
    expanded = (device.type == "cpu" and not low_memory) or weight_format == "none"
    with open_checkpoint(Path(path)) as checkpoint:
        return _Loader(checkpoint, config, device, dtype, weight_format, expanded, prepacked).load()


def resolve_format(config: ModelConfig, quantization: Quantization) -> Format:
    """The format that the linear layers of a model get.

    Raises:
        ModelError: the checkpoint is quantized by an unsupported method, or would have to be quantized twice.
    """
    if config.quantization is None:
        return "nf4" if quantization == "auto" else quantization
    check_quantization_config(config.quantization)
    if quantization == "int8":
        raise ModelError(
            "the checkpoint is NF4 already and would lose twice by int8; use auto, nf4 or none",
            param="quantization",
        )
    return "nf4" if quantization == "auto" else quantization


class _Loader:
    """One load: the names that must be there, then every tensor by name."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        weight_format: Format,
        expanded: bool,
        prepacked: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._device = device
        self._dtype = dtype
        self._format = weight_format
        self._expanded = expanded
        self._prepacked = prepacked

    def load(self) -> DecoderWeights:
        self._check_names()
        embed, lm_head = self._embeddings()
        return DecoderWeights(
            config=self._config,
            embed=embed,
            layers=tuple(self._layer(layer) for layer in range(self._config.num_layers)),
            norm=self._tensor(_NORM, (self._config.hidden_size,)),
            lm_head=lm_head,
            dtype=self._dtype,
            device=self._device,
            prepacked=self._prepacked,
        )

    def _check_names(self) -> None:
        """Compares the stored names with those that the configuration asks for, before much is read."""
        expected = {_NORM}
        matrices = [_EMBED, _HEAD]
        for layer in range(self._config.num_layers):
            prefix = f"model.layers.{layer}."
            expected |= {
                prefix + name for name in ("input_layernorm.weight", "post_attention_layernorm.weight")
            }
            if self._config.qk_norm:
                expected |= {prefix + "self_attn.q_norm.weight", prefix + "self_attn.k_norm.weight"}
            for module, module_path in _MODULE_PATHS.items():
                matrices.append(f"{prefix}{module_path}.weight")
                if self._config.has_bias(module):
                    expected.add(f"{prefix}{module_path}.bias")
        for name in matrices:
            quantized = self._config.quantization is not None and is_quantized(self._checkpoint, name)
            expected.update(part_names(self._checkpoint, name) if quantized else [name])
        stored = {name for name in self._checkpoint.names if not _IGNORED.fullmatch(name)}
        optional = self._absent_tied_names(stored)
        self._refuse("missing from", expected - stored - optional)
        self._refuse("not expected in", stored - expected)

    def _absent_tied_names(self, stored: set[str]) -> set[str]:
        if self._config.tie_word_embeddings and stored & {_EMBED, _HEAD}:
            return {_EMBED, _HEAD}
        return set()

    def _refuse(self, problem: str, names: set[str]) -> None:
        if not names:
            return
        shown = ", ".join(sorted(names)[:_MAX_NAMES_SHOWN])
        more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
        raise ModelError(
            f"tensors {problem} this {self._config.family} checkpoint: {shown}{more}", param=sorted(names)[0]
        )

    def _embeddings(self) -> tuple[Tensor, Tensor]:
        shape = (self._config.vocab_size, self._config.hidden_size)
        if not self._config.tie_word_embeddings:
            return self._matrix(_EMBED, shape), self._matrix(_HEAD, shape)
        embed = self._matrix(_EMBED if _EMBED in self._checkpoint else _HEAD, shape)
        both_stored = _EMBED in self._checkpoint and _HEAD in self._checkpoint
        if both_stored and not torch.equal(self._matrix(_HEAD, shape), embed):
            raise ModelError(
                f"config.json ties the embeddings, but {_EMBED} and {_HEAD} differ",
                param="tie_word_embeddings",
            )
        return embed, embed

    def _layer(self, layer: int) -> LayerWeights:
        config, prefix = self._config, f"model.layers.{layer}."
        hidden, head = (config.hidden_size,), (config.head_dim,)
        return assemble_layer(
            input_norm=self._tensor(prefix + "input_layernorm.weight", hidden),
            post_attention_norm=self._tensor(prefix + "post_attention_layernorm.weight", hidden),
            q_norm=self._tensor(prefix + "self_attn.q_norm.weight", head) if config.qk_norm else None,
            k_norm=self._tensor(prefix + "self_attn.k_norm.weight", head) if config.qk_norm else None,
            linear=lambda module: self._linear(prefix + _MODULE_PATHS[module], module),
            prepacked=self._prepacked,
        )

    def _linear(self, prefix: str, module: str) -> QuantizedLinear:
        in_features, out_features = self._config.module_shapes[module]
        shape, name = (out_features, in_features), prefix + ".weight"
        bias = self._tensor(prefix + ".bias", (out_features,)) if self._config.has_bias(module) else None
        if self._config.quantization is not None:
            if is_quantized(self._checkpoint, name):
                packed = read_nf4(self._checkpoint, name, shape, self._device)
                return QuantizedLinear(packed, dtype=self._dtype, bias=bias, expanded=self._expanded)
            return QuantizedLinear(self._tensor(name, shape), dtype=self._dtype, bias=bias)
        weight = self._tensor(name, shape)
        try:
            return encode(weight, format=self._format, dtype=self._dtype, bias=bias, expanded=self._expanded)
        except ValueError as error:
            raise ModelError(f"tensor {name}: {error}", param=name) from error

    def _matrix(self, name: str, shape: tuple[int, int]) -> Tensor:
        """A matrix that is kept dense, however it is stored."""
        if self._config.quantization is not None and is_quantized(self._checkpoint, name):
            packed = read_nf4(self._checkpoint, name, shape, self._device)
            return QuantizedLinear(packed, dtype=self._dtype).weight_dense()
        return self._tensor(name, shape)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """An unquantized tensor, copied to the device in the compute dtype."""
        stored = self._checkpoint.tensor(name)
        if tuple(stored.shape) != shape:
            raise ModelError(
                f"tensor {name} has shape {list(stored.shape)}, the model needs {list(shape)}", param=name
            )
        if stored.dtype not in _FLOATS:
            raise ModelError(
                f"tensor {name} is {stored.dtype}, which is not supported unquantized", param=name
            )
        return stored.to(device=self._device, dtype=self._dtype, copy=True)
