"""A random model as a directory that `weft serve` and transformers load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import safetensors.torch

import weft_server.demo
from weft_server.bench.models import RandomModel

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_checkpoint(model: RandomModel, folder: Path) -> None:
    """Write `config.json`, the weights in safetensors, and the demo model's tokenizer into the folder.

    The tokenizer has fewer tokens than the shapes' vocabularies (but `tiny`'s, which can therefore be asked
    by token ids alone); what a random model generates beyond it decodes to nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(model.shape.hf_config), indent=1), encoding="utf-8")
    tensors = {name: tensor.cpu().clone() for name, tensor in model.tensors().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = Path(weft_server.demo.__file__).parent / "base_model"
    for name in _TOKENIZER_FILES:
        shutil.copyfile(source / name, folder / name)
