"""Which tokens a sequence has seen, as penalties look at them: vectors over the vocabulary, on the device.

Kept from token to token, so that sampling one token costs the new tokens and not the whole prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft_kernels.transfer import upload_indices
from weft_server.protocol import SamplingParams


class TokenHistory:
    """One sequence's tokens.

    Attributes:
        seen: `[vocab]` bool, tokens of prompt or output; None without a repetition penalty.
        counts: `[vocab]` int32, occurrences in the output; None without a presence or frequency penalty.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], vocab_size: int, device: torch.device
    ) -> None:
        self.seen: Tensor | None = None
        self.counts: Tensor | None = None
        self._num_added = 0
        self._device = device
        if params.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen.index_fill_(0, upload_indices(prompt, device), True)
        if params.presence_penalty or params.frequency_penalty:
            self.counts = torch.zeros(vocab_size, dtype=torch.int32, device=device)

    def add(self, output: Sequence[int]) -> None:
        """Take in what `output`, the whole output so far, has more than at the last call."""
        if len(output) == self._num_added:
            return
        new = upload_indices(output[self._num_added :], self._device)
        self._num_added = len(output)
        if self.seen is not None:
            self.seen.index_fill_(0, new, True)
        if self.counts is not None:
            self.counts.index_add_(0, new, torch.ones_like(new, dtype=torch.int32))


def needs_history(params: SamplingParams) -> bool:
    """Whether sampling looks at the tokens so far."""
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
