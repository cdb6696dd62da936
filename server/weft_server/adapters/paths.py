"""Module names and Hugging Face module paths: how a (layer, module) of the decoder is called in PEFT's files.

Owns the vocabulary only; what a file may contain is `peft.py`'s, where a tensor lies is `layout.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

MODULES: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The adaptable linear layers of a decoder layer; a module's index is its position here."""

MODULE_GROUPS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)
"""Modules that read the same input and are computed by one kernel call."""

OUTER_MODULES: tuple[str, ...] = ("model.embed_tokens", "lm_head")
"""Paths of the adaptable modules outside the decoder layers; adapters on them are refused."""

ModuleShapes: TypeAlias = Mapping[str, tuple[int, int]]
"""Module name → (in_features, out_features), the same in every layer; absent modules are left out."""

_PARENT = {module: "self_attn" if module in MODULES[:4] else "mlp" for module in MODULES}
_PATH = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(self_attn|mlp)\.([a-z_]+)")


def module_path(layer: int, module: str) -> str:
    """Path of a module below the causal language model, e.g. `model.layers.0.self_attn.q_proj`."""
    return f"model.layers.{layer}.{_PARENT[module]}.{module}"


def parse_module_path(path: str) -> tuple[int, str] | None:
    """The (layer, module) that a path names, or None if it is not the path of a decoder linear layer."""
    match = _PATH.fullmatch(path)
    if match is None or _PARENT.get(match[3]) != match[2]:
        return None
    return int(match[1]), match[3]
