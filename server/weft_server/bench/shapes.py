"""Shapes of the models that are measured, as the content of a Hugging Face `config.json`.

Knows no weights: these are random (`models`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft_server.errors import ConfigError
from weft_server.model.config import ModelConfig

_LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def _llama(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    positions: int,
) -> dict[str, Any]:
    return {
        **_LLAMA,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": _llama(64, 128, 2, 4, 2, 16, 512, 512),
    "bench-200m": _llama(1024, 2816, 12, 16, 4, 64, 32000, 4096),
    "bench-1b": _llama(2048, 8192, 16, 32, 8, 64, 32000, 8192),
    "llama-3.1-8b": {
        **_llama(4096, 14336, 32, 32, 8, 128, 128256, 131072),
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
}
"""By name: `tiny` is for trying the benchmarks themselves."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model to be measured: its name in reports, and the content of its `config.json`."""

    name: str
    hf_config: Mapping[str, Any]

    @property
    def config(self) -> ModelConfig:
        """As Weft reads it."""
        return ModelConfig.from_dict(self.hf_config)


def read_shape(model: str) -> Shape:
    """A shape of this module by name, or a `config.json` or its folder by path.

    Raises:
        ConfigError: neither; the message names the shapes.
    """
    if model in SHAPES:
        return Shape(model, SHAPES[model])
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model is {model!r}, neither a readable config.json nor one of {', '.join(SHAPES)} ({error})"
        ) from error
    return Shape(file.resolve().parent.name, content)
