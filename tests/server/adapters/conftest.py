"""Tiny base models, and adapters saved by PEFT itself with random (non-zero) B."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import pytest
import torch
import transformers

NUM_LAYERS = 3
HIDDEN, INTERMEDIATE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCAB = 48, 80, 4, 2, 12, 97

SHAPES: Mapping[str, tuple[int, int]] = {
    "q_proj": (HIDDEN, NUM_HEADS * HEAD_DIM),
    "k_proj": (HIDDEN, NUM_KV_HEADS * HEAD_DIM),
    "v_proj": (HIDDEN, NUM_KV_HEADS * HEAD_DIM),
    "o_proj": (NUM_HEADS * HEAD_DIM, HIDDEN),
    "gate_proj": (HIDDEN, INTERMEDIATE),
    "up_proj": (HIDDEN, INTERMEDIATE),
    "down_proj": (INTERMEDIATE, HIDDEN),
}


@dataclass(frozen=True)
class SavedAdapter:
    """What `save_pretrained` wrote, and the model that it was saved from."""

    folder: Path
    config_json: bytes
    weights: bytes
    model: peft.PeftModel


SavePeft = Callable[..., SavedAdapter]


@pytest.fixture(scope="session")
def num_layers() -> int:
    return NUM_LAYERS


@pytest.fixture(scope="session")
def shapes() -> Mapping[str, tuple[int, int]]:
    return SHAPES


def _config(family: str) -> transformers.PretrainedConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "max_position_embeddings": 64,
        "tie_word_embeddings": family == "qwen2",
    }
    return {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[family](**sizes)


@pytest.fixture(scope="session")
def base_model() -> Callable[[str], transformers.PreTrainedModel]:
    """A fresh tiny base of a family, always with the same weights."""

    def build(family: str) -> transformers.PreTrainedModel:
        torch.manual_seed(11)
        return transformers.AutoModelForCausalLM.from_config(_config(family)).eval()

    return build


@pytest.fixture
def save_peft(base_model: Callable[[str], transformers.PreTrainedModel], tmp_path: Path) -> SavePeft:
    """Build an adapter with PEFT, fill it with random weights and save it as a user would."""

    def save(family: str = "llama", *, dtype: torch.dtype = torch.float32, **lora: Any) -> SavedAdapter:
        lora.setdefault("task_type", "CAUSAL_LM")
        model = peft.get_peft_model(base_model(family), peft.LoraConfig(**lora)).eval()
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.2).to(dtype)
        folder = tmp_path / "adapter"
        model.save_pretrained(str(folder))
        return SavedAdapter(
            folder,
            (folder / "adapter_config.json").read_bytes(),
            (folder / "adapter_model.safetensors").read_bytes(),
            model,
        )

    return save
