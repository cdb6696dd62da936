"""Strict reading of PEFT's `adapter_config.json`.

Owns the file's vocabulary: which keys are understood, which are harmless, and which name a feature that would
change outputs and is not implemented, refused by name. So is an unknown key, unless its value is neutral.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from weft_server.adapters.config import ALL_LINEAR, LoraConfig, shown
from weft_server.adapters.errors import AdapterError

MAX_CONFIG_BYTES = 1 << 20

_IGNORED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
"""Keys of PEFT that do not change what a saved adapter computes (initialisers' settings, provenance)."""

_UNSUPPORTED: Mapping[str, str] = {
    "use_dora": "DoRA (use_dora) is not supported; train a plain LoRA",
    "lora_bias": "lora_bias is not supported; train with lora_bias=False",
    "modules_to_save": "modules_to_save is not supported, as the base is shared; adapt linear layers only",
    "fan_in_fan_out": "fan_in_fan_out is not supported; save with fan_in_fan_out=False",
    "trainable_token_indices": "trainable_token_indices is not supported, because the embeddings are shared",
    "layer_replication": "layer_replication is not supported, because it changes the base model",
    "target_parameters": "target_parameters is not supported; target linear modules with target_modules",
    "alora_invocation_tokens": "alora_invocation_tokens (activated LoRA) is not supported; train a plain one",
    "use_qalora": "QALoRA (use_qalora) is not supported; train a plain LoRA",
    "use_bdlora": "block-diagonal LoRA (use_bdlora) is not supported; train a plain LoRA",
    "arrow_config": "Arrow routing (arrow_config) is not supported; upload the task adapters one by one",
    "kasa_config": "KaSA (kasa_config) is not supported, because it changes the base model",
    "monteclora_config": "MonteCLoRA (monteclora_config) is not supported; train a plain LoRA",
    "velora_config": "VeLoRA (velora_config) is not supported; train a plain LoRA",
    "megatron_config": "Megatron layers (megatron_config) are not supported; save from a plain model",
}
_PURE_INITIALISERS = ("gaussian", "eva", "orthogonal")
_ACTIVE_WHEN_EMPTY = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "monteclora_config",
        "use_bdlora",
        "velora_config",
    }
)
"""Keys by which PEFT switches a feature on even with an empty object or list."""

_UNDERSTOOD = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "bias",
        "init_lora_weights",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
    }
)


def parse_config(config_json: bytes) -> LoraConfig:
    """Read an `adapter_config.json` as PEFT 0.18 and later write it (older files work too).

    Raises:
        AdapterError: not a JSON object, not LoRA, a value of the wrong type or range, an unsupported feature,
            or an unknown key with a value that is not neutral.
    """
    raw = _parse_object(config_json)
    _refuse_unsupported(raw)
    reader = _Reader(raw)
    return LoraConfig(
        rank=reader.integer("r", 8),
        alpha=reader.number("lora_alpha", 8.0),
        use_rslora=reader.boolean("use_rslora"),
        dropout=reader.number("lora_dropout", 0.0),
        target_modules=reader.targets(),
        exclude_modules=reader.names("exclude_modules"),
        layers_to_transform=reader.layers("layers_to_transform"),
        layers_pattern=reader.layer_names("layers_pattern"),
        rank_pattern=tuple(
            (key, reader.as_integer(f"rank_pattern[{key!r}]", value))
            for key, value in reader.pattern("rank_pattern")
        ),
        alpha_pattern=tuple(
            (key, reader.as_number(f"alpha_pattern[{key!r}]", value))
            for key, value in reader.pattern("alpha_pattern")
        ),
    )


def _parse_object(config_json: bytes) -> dict[str, Any]:
    if len(config_json) > MAX_CONFIG_BYTES:
        raise AdapterError(
            f"adapter_config.json has {len(config_json)} bytes; at most {MAX_CONFIG_BYTES} are allowed"
        )
    try:
        raw = json.loads(config_json)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"adapter_config.json is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise AdapterError("adapter_config.json must hold a JSON object")
    return raw


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise AdapterError(
            f"peft_type is {shown(raw.get('peft_type'))}; only LORA adapters are supported", param="peft_type"
        )
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterError(
            f"task_type is {shown(raw['task_type'])}; only CAUSAL_LM adapters are supported",
            param="task_type",
        )
    if raw.get("bias", "none") not in (None, "none"):
        raise AdapterError(
            f"bias is {shown(raw['bias'])}: trained biases are not supported, train with bias='none'",
            param="bias",
        )
    initialiser = raw.get("init_lora_weights", True)
    if not (initialiser is None or isinstance(initialiser, bool) or initialiser in _PURE_INITIALISERS):
        raise AdapterError(
            f"init_lora_weights is {shown(initialiser)}, which may have changed the base model's weights; "
            "convert to plain LoRA with save_pretrained(path_initial_model_for_weight_conversion=…)",
            param="init_lora_weights",
        )
    for key, value in raw.items():
        if key in _UNDERSTOOD or key in _IGNORED or _is_neutral(key, value):
            continue
        reason = _UNSUPPORTED.get(
            key, f"the configuration key {key!r} is not known to Weft and its value is not neutral"
        )
        raise AdapterError(f"{reason} (its value is {shown(value)})", param=key)


def _is_neutral(key: str, value: Any) -> bool:
    if value is None or value is False:
        return True
    return key not in _ACTIVE_WHEN_EMPTY and isinstance(value, str | list | dict) and not value


class _Reader:
    """Typed access to the keys of a configuration; null means the default."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def integer(self, key: str, default: int) -> int:
        value = self._raw.get(key)
        return default if value is None else self.as_integer(key, value)

    def number(self, key: str, default: float) -> float:
        value = self._raw.get(key)
        return default if value is None else self.as_number(key, value)

    def boolean(self, key: str) -> bool:
        value = self._raw.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise _wrong_type(key, value, "true or false")

    def targets(self) -> tuple[str, ...] | str:
        found = self.names("target_modules")
        if not found:
            raise AdapterError("target_modules is missing; list the adapted modules", param="target_modules")
        return ALL_LINEAR if isinstance(found, str) and found.lower() == ALL_LINEAR else found

    def names(self, key: str) -> tuple[str, ...] | str:
        value = self._raw.get(key)
        if isinstance(value, str):
            return value
        return self._strings(key, value)

    def layer_names(self, key: str) -> tuple[str, ...]:
        value = self._raw.get(key)
        names = (value,) if isinstance(value, str) and value else self._strings(key, value or None)
        for name in names:
            if not name.replace("_", "").replace(".", "").isalnum():
                raise AdapterError(
                    f"{key} {name!r} is not a plain module name; regular expressions are not supported here",
                    param=key,
                )
        return names

    def layers(self, key: str) -> tuple[int, ...] | None:
        value = self._raw.get(key)
        if value is None or value == []:
            return None
        values = value if isinstance(value, list) else [value]
        return tuple(self.as_integer(key, layer) for layer in values)

    def pattern(self, key: str) -> Iterable[tuple[str, Any]]:
        value = self._raw.get(key)
        if value is None:
            return ()
        if not isinstance(value, dict):
            raise _wrong_type(key, value, "an object")
        return value.items()

    def as_integer(self, where: str, value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise _wrong_type(where, value, "an integer")

    def as_number(self, where: str, value: Any) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if math.isfinite(number):
                return number
        raise _wrong_type(where, value, "a finite number")

    def _strings(self, key: str, value: Any) -> tuple[str, ...]:
        if value is None:
            return ()
        if isinstance(value, list) and all(isinstance(item, str) and item for item in value):
            return tuple(value)
        raise _wrong_type(key, value, "a list of names")


def _wrong_type(where: str, value: Any, expected: str) -> AdapterError:
    return AdapterError(f"{where} is {shown(value)}; it must be {expected}", param=where.partition("[")[0])
