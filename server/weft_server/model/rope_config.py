"""Rotary position embedding parameters, as a Hugging Face configuration states them.

Owns their two spellings (`rope_theta` with `rope_scaling`, and `rope_parameters`) and their defaults.
Computes no frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from weft_server.model.config_fields import ConfigFields, ModelError

RopeType = Literal["default", "linear", "llama3", "yarn"]

_DEFAULT_ROPE_THETA = 10_000.0

_ROPE_NAMES: Mapping[RopeType, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    ),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    theta: the base wavelength.
    type: how the inverse frequencies are derived from it.
    parameters: complete for the type, no further defaults to apply:
        default: none
        linear: factor
        llama3: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
        yarn: factor, original_max_position_embeddings, beta_fast, beta_slow, truncate, and attention_factor,
            mscale, mscale_all_dim, each of which may be None (a None attention_factor is inferred from the
            others, as transformers does)
    """

    theta: float
    type: RopeType = "default"
    parameters: Mapping[str, float | bool | None] = field(default_factory=dict)


def read_rope(fields: ConfigFields, max_positions: int) -> RopeConfig:
    """Reads the rotary embedding of a model whose `max_position_embeddings` is `max_positions`.

    Raises:
        ModelError: an unsupported type or parameter, or contradictory spellings; named.
    """
    raw = _rope_dict(fields)
    rope = ConfigFields(raw, where="config.json, rope parameters")
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    known: tuple[RopeType, ...] = get_args(RopeType)
    if rope_type not in known:
        raise ModelError(
            f"config.json: rope type {rope_type!r} is not supported; supported are {', '.join(known)}",
            param="rope_type",
        )
    partial = rope.get("partial_rotary_factor") or fields.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise ModelError(
            f"config.json: partial_rotary_factor={partial!r} is not supported (only 1)",
            param="partial_rotary_factor",
        )
    allowed = {"rope_theta", "rope_type", "type", "partial_rotary_factor", *_ROPE_NAMES[rope_type]}
    for name, value in raw.items():
        if name not in allowed and value is not None:
            raise ModelError(
                f"config.json: rope parameter {name}={value!r} is not supported with rope type {rope_type!r}",
                param=name,
            )
    theta = rope.number("rope_theta", fields.number("rope_theta", _DEFAULT_ROPE_THETA))
    return RopeConfig(theta, rope_type, _rope_parameters(rope_type, rope, fields, max_positions))


def _rope_dict(fields: ConfigFields) -> dict[str, Any]:
    old, new = fields.get("rope_scaling"), fields.get("rope_parameters")
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, dict):
            raise fields.bad(name, "an object")
    if old and new and old != new:
        raise ModelError(
            "config.json: rope_scaling and rope_parameters contradict each other", param="rope_scaling"
        )
    chosen: dict[str, Any] = dict(old or new or {})
    nested = [name for name, value in chosen.items() if isinstance(value, dict)]
    if nested:
        raise ModelError(
            f"config.json: rope parameters per layer type ({', '.join(nested)}) are not supported",
            param="rope_parameters",
        )
    return chosen


def _rope_parameters(
    rope_type: RopeType, rope: ConfigFields, fields: ConfigFields, max_positions: int
) -> dict[str, float | bool | None]:
    if rope_type == "default":
        return {}
    if rope_type == "linear":
        return {"factor": rope.number("factor")}
    original = rope.count("original_max_position_embeddings", max_positions)
    original = fields.count("original_max_position_embeddings", original)
    if rope_type == "llama3":
        return {
            "factor": rope.number("factor"),
            "low_freq_factor": rope.number("low_freq_factor"),
            "high_freq_factor": rope.number("high_freq_factor"),
            "original_max_position_embeddings": original,
        }
    return {
        "factor": rope.number("factor", max_positions / original),
        "original_max_position_embeddings": original,
        "beta_fast": rope.number("beta_fast", 32.0),
        "beta_slow": rope.number("beta_slow", 1.0),
        "truncate": rope.flag("truncate", True),
        "attention_factor": rope.optional_number("attention_factor"),
        "mscale": rope.optional_number("mscale"),
        "mscale_all_dim": rope.optional_number("mscale_all_dim"),
    }
