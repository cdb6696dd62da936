"""Angles of rotary position embeddings (Su et al. 2021) with the scalings that published checkpoints use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weft_kernels.rope import Rotation
from weft_server.model.config import ModelConfig, RopeConfig


class RotaryTable:
    """Cosines and sines of every position, `[max_positions, D]` each, in the compute dtype."""

    def __init__(
        self, config: ModelConfig, *, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        inv_freq, attention_factor = inverse_frequencies(
            config.rope, config.head_dim, config.max_position_embeddings
        )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        angles = torch.outer(torch.arange(max_positions, dtype=wide), inv_freq.to(wide))
        angles = torch.cat((angles, angles), dim=-1)
        self._cos = (angles.cos() * attention_factor).to(device=device, dtype=dtype)
        self._sin = (angles.sin() * attention_factor).to(device=device, dtype=dtype)

    def at(self, positions: Tensor) -> Rotation:
        """Cosines and sines of positions `[T]`, each `[T, 1, D]` to broadcast over heads."""
        return Rotation(
            self._cos.index_select(0, positions).unsqueeze(1),
            self._sin.index_select(0, positions).unsqueeze(1),
        )


def _number(rope: RopeConfig, name: str, default: float | None = None) -> float:
    value = rope.parameters.get(name)
    if value is None and default is None:
        raise ValueError(f"rope type {rope.type!r} lacks {name!r}; ModelConfig should have refused it")
    return float(default if value is None else value)  # type: ignore[arg-type]


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """Inverse frequencies `[D / 2]` (fp32, as transformers computes them) and the attention factor."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    inv_freq = 1.0 / (rope.theta**exponents)
    if rope.type == "default":
        return inv_freq, 1.0
    if rope.type == "linear":
        return inv_freq / _number(rope, "factor"), 1.0
    if rope.type == "llama3":
        return _llama3(inv_freq, rope), 1.0
    if rope.type == "yarn":
        return _yarn(rope, head_dim, max_positions)
    raise ValueError(f"rope type {rope.type!r} has no frequencies; ModelConfig should have refused it")


def _llama3(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: low frequencies divided by `factor`, high ones kept, those between interpolated."""
    factor = _number(rope, "factor")
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    original = _number(rope, "original_max_position_embeddings")
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    medium = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(medium, between, scaled)


def _yarn(rope: RopeConfig, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023), with the defaults and the attention factor of transformers."""
    parameters = rope.parameters
    factor = _number(rope, "factor")
    original = _number(rope, "original_max_position_embeddings", max_positions)
    beta_fast, beta_slow = _number(rope, "beta_fast", 32), _number(rope, "beta_slow", 1)

    def correction_dim(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction_dim(beta_fast), correction_dim(beta_slow)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    inv_freq = ramp / (factor * frequencies) + (1 - ramp) / frequencies
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = _yarn_attention_factor(
            factor, parameters.get("mscale"), parameters.get("mscale_all_dim")
        )
    return inv_freq, float(attention_factor)


def _yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)
