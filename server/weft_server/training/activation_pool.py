"""Memory for the activations that packs keep, used again by the packs that follow."""

from __future__ import annotations

import torch

from weft_server.model.activations import LayerActivations
from weft_server.model.config import ModelConfig

_ROUNDING = 64


class ActivationPool:
    """What ends is kept for what begins: fresh memory costs a page fault for every few kilobytes written.

    It never holds more than was in use at one time, but for rounding: before anything is allocated, what is
    spare is let go.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._dtype = dtype
        self._device = device
        self._spare: list[LayerActivations] = []

    def take(self, num_tokens: int) -> LayerActivations:
        """`[L, at least num_tokens, ...]`, uninitialized; its caller's until given back."""
        fitting = [spare for spare in self._spare if spare.num_rows >= num_tokens]
        if fitting:
            chosen = min(fitting, key=lambda spare: spare.num_rows)
            self._spare = [spare for spare in self._spare if spare is not chosen]
            return chosen
        self._spare.clear()
        num_rows = -(-num_tokens // _ROUNDING) * _ROUNDING
        leading = (self._config.num_layers, num_rows)
        return LayerActivations.empty(self._config, leading, self._dtype, self._device)

    def give_back(self, activations: LayerActivations) -> None:
        """Nothing issued from now on reads them."""
        self._spare.append(activations)
