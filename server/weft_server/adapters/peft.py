"""PEFT's adapter format, read strictly and written so that `peft` loads it and computes the same.

Owns the names and orientation of the tensors in `adapter_model.safetensors`. Reading is strict because
whatever is skipped is silently missing from every answer: each key must belong to a targeted module and each
targeted module must have both tensors. Knows neither where the bytes come from nor where the weights go.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from weft_server.adapters.config import LoraConfig, ResolvedModules
from weft_server.adapters.errors import AdapterError
from weft_server.adapters.finite import all_finite
from weft_server.adapters.layout import MODULES, AdapterLayout, ModuleShapes
from weft_server.adapters.packed import PackedAdapter, pack
from weft_server.adapters.paths import module_path, parse_module_path
from weft_server.adapters.peft_config import parse_config

FORMAT_VERSION = "0.18.0"
"""The version of PEFT whose format is written."""

_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_FOREIGN_KEYS: tuple[tuple[str, str], ...] = (
    (".lora_magnitude_vector", "belongs to DoRA, which is not supported"),
    (".lora_embedding_", "adapts an embedding, which is shared and cannot be adapted"),
    (".base_layer.", "is a copy of base weights; save with save_embedding_layers=False"),
    (".modules_to_save.", "is a fully trained module; modules_to_save is not supported"),
    (".bias", "is a trained bias; train with bias='none' and lora_bias=False"),
)


def read_peft(config_json: bytes, weights: bytes, *, num_layers: int, shapes: ModuleShapes) -> PackedAdapter:
    """Read an adapter and check it against its base.

    Args:
        config_json: content of `adapter_config.json`.
        weights: content of `adapter_model.safetensors`; keys with or without the prefix `base_model.model.`
            and with or without an adapter's name before `weight`.
        num_layers: decoder layers of the base.
        shapes: module → (in_features, out_features) of the base.

    Raises:
        AdapterError: anything unsupported, missing, superfluous, misshapen or not finite; names the key or
            feature.
    """
    config = parse_config(config_json)
    resolved = config.resolve(num_layers, shapes)
    found = _tensors_by_module(_parse_safetensors(weights), resolved, num_layers, shapes)
    tensors: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for key in resolved:
        lora_a, lora_b = (found.get((*key, side)) for side in "AB")
        if lora_a is None or lora_b is None:
            raise AdapterError(
                f"{module_path(*key)} is targeted by the configuration, but its "
                f"lora_{'A' if lora_a is None else 'B'} is not in the weights; "
                "narrow target_modules or add the tensor"
            )
        tensors[key] = (lora_a, lora_b)
    layout = AdapterLayout.build(num_layers, shapes, {key: module.rank for key, module in resolved.items()})
    return pack(layout, {key: module.scale for key, module in resolved.items()}, tensors, config)


def write_peft(packed: PackedAdapter, *, base_model_name: str) -> tuple[bytes, bytes]:
    """The adapter as (`adapter_config.json`, `adapter_model.safetensors`), tensors in the packed dtype.

    Ranks and alphas that differ between modules become `rank_pattern` and `alpha_pattern`.
    """
    tensors: dict[str, Tensor] = {}
    for entry in packed.layout:
        path = _PREFIX + module_path(entry.layer, entry.module_name)
        lora_a = packed.layout.a(packed.weights, entry.layer, entry.module)
        lora_b = packed.layout.b(packed.weights, entry.layer, entry.module)
        tensors[f"{path}.lora_A.weight"] = lora_a.contiguous()
        tensors[f"{path}.lora_B.weight"] = lora_b.t().contiguous()
    config = _config_object(packed, base_model_name)
    return json.dumps(config, indent=2, sort_keys=True).encode(), safetensors.torch.save(
        tensors, {"format": "pt"}
    )


def _parse_safetensors(weights: bytes) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(weights)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        # Only now: the length that a safetensors file starts with may look like a pickle's first bytes.
        if weights.startswith(_PICKLE_STARTS):
            raise AdapterError(
                "the weights are a pickle (.bin) file, which can run code when loaded; "
                "save the adapter with safe_serialization=True"
            ) from error
        raise AdapterError(f"the weights are not a safetensors file that can be read: {error}") from error
    return tensors


def _tensors_by_module(
    raw: Mapping[str, Tensor], resolved: ResolvedModules, num_layers: int, shapes: ModuleShapes
) -> dict[tuple[int, str, str], Tensor]:
    found: dict[tuple[int, str, str], Tensor] = {}
    adapters: dict[str | None, str] = {}
    for key, tensor in raw.items():
        layer, module, side, adapter = _parse_key(key, num_layers, shapes)
        if (layer, module) not in resolved:
            raise AdapterError(
                f"tensor {key!r} is in the weights, but the configuration does not target "
                f"{module_path(layer, module)}; widen target_modules or remove the tensor"
            )
        adapters.setdefault(adapter, key)
        if len(adapters) > 1:
            raise AdapterError(
                f"the weights hold several adapters: {' and '.join(map(repr, adapters.values()))}"
            )
        if (layer, module, side) in found:
            raise AdapterError(f"tensor {key!r} is in the weights twice, under different spellings")
        _check_tensor(key, tensor, side, resolved[layer, module].rank, shapes[module])
        found[layer, module, side] = tensor
    return found


def _parse_key(key: str, num_layers: int, shapes: ModuleShapes) -> tuple[int, str, str, str | None]:
    for mark, reason in _FOREIGN_KEYS:
        if mark in key:
            raise AdapterError(f"tensor {key!r} {reason}")
    match = _KEY.fullmatch(key.removeprefix(_PREFIX))
    if match is None:
        raise AdapterError(f"tensor {key!r} is not a LoRA weight (…lora_A.weight or …lora_B.weight)")
    place = parse_module_path(match["path"])
    if place is None or place[1] not in shapes:
        raise AdapterError(
            f"tensor {key!r} adapts {match['path']}, which is no adaptable layer of this base model; "
            f"they are {', '.join(module_path(0, m) for m in MODULES if m in shapes)} and so on"
        )
    if place[0] >= num_layers:
        raise AdapterError(
            f"tensor {key!r} adapts layer {place[0]}, but the base model has {num_layers} layers"
        )
    return *place, match["side"], match["adapter"]


def _check_tensor(key: str, tensor: Tensor, side: str, rank: int, shape: tuple[int, int]) -> None:
    if tensor.dtype not in _DTYPES:
        raise AdapterError(
            f"tensor {key!r} is {tensor.dtype}; save the adapter as float32, bfloat16 or float16"
        )
    expected = (rank, shape[0]) if side == "A" else (shape[1], rank)
    if tuple(tensor.shape) != expected:
        raise AdapterError(
            f"tensor {key!r} has shape {list(tensor.shape)}, but rank {rank} on a layer of "
            f"{shape[0]} inputs and {shape[1]} outputs needs {list(expected)}"
        )
    if not all_finite(tensor):
        raise AdapterError(f"tensor {key!r} contains NaN or Inf")


def _config_object(packed: PackedAdapter, base_model_name: str) -> dict[str, object]:
    ranks = {(entry.layer, entry.module_name): entry.rank for entry in packed.layout}
    alphas = {key: _alpha(packed.config, packed.scales[key], rank) for key, rank in ranks.items()}
    rank, rank_pattern = _as_pattern(ranks)
    alpha, alpha_pattern = _as_pattern(alphas)
    return {
        "alpha_pattern": {key: _plain_number(value) for key, value in alpha_pattern.items()},
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _plain_number(alpha),
        "lora_dropout": packed.config.dropout,
        "peft_type": "LORA",
        "peft_version": FORMAT_VERSION,
        "r": int(rank),
        "rank_pattern": {key: int(value) for key, value in rank_pattern.items()},
        "target_modules": _target_names(packed.layout),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": packed.config.use_rslora,
    }


def _alpha(config: LoraConfig, scale: float, rank: int) -> float:
    """The alpha that gives back exactly this scale, the roundest one there is."""
    alpha = scale * math.sqrt(rank) if config.use_rslora else scale * rank
    above, below = math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)
    for candidate in (round(alpha), round(alpha, 9), alpha, above, below):
        if config.scale(rank, float(candidate)) == scale:
            return float(candidate)
    return alpha


def _as_pattern(values: Mapping[tuple[int, str], float]) -> tuple[float, dict[str, float]]:
    """The commonest value, and the others by module name or, where its layers differ, by path."""
    default = Counter(values.values()).most_common(1)[0][0]
    pattern: dict[str, float] = {}
    for module in MODULES:
        by_layer = {layer: value for (layer, name), value in values.items() if name == module}
        if len(set(by_layer.values())) == 1:
            value = next(iter(by_layer.values()))
            if value != default:
                pattern[module] = value
        else:
            pattern |= {module_path(layer, module): v for layer, v in by_layer.items() if v != default}
    return default, pattern


def _target_names(layout: AdapterLayout) -> list[str]:
    """Module names, if each is adapted in every layer of the base; else whole paths."""
    names = layout.module_names
    if len(layout) == layout.num_layers * len(names):
        return list(names)
    return sorted(module_path(entry.layer, entry.module_name) for entry in layout)


def _plain_number(value: float) -> int | float:
    return int(value) if value.is_integer() else value
