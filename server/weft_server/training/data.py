"""Tokenized datasets and the order in which a job sees them.

A dataset is a safetensors blob, made when the job was validated, with `tokens` int32 `[total]`, `targets`
uint8 `[total]` (1 where the token is to be predicted), `offsets` int64 `[n + 1]` and `lines` int32 `[n]` (the
1-based line of the JSONL file that each example came from).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import safetensors.torch
import torch
from torch import Tensor

IGNORED = -100
"""Label of a position that is not trained (PyTorch's and transformers' convention)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence: `tokens` `[n]` int64 and `labels` `[n]` int64.

    `labels[i]` is the token that position `i` must predict (token `i + 1`), or `IGNORED`.
    """

    idx: int
    line: int
    tokens: Tensor
    labels: Tensor

    @property
    def num_targets(self) -> int:
        """Positions that contribute to the loss."""
        return int((self.labels != IGNORED).sum())


class DatasetError(Exception):
    """The dataset blob is not what `datasets` writes."""


class Dataset:
    """Read-only access to the examples of a tokenized dataset."""

    def __init__(self, blob: bytes) -> None:
        try:
            tensors = safetensors.torch.load(blob)
            self._tokens = tensors["tokens"].to(torch.int64)
            self._targets = tensors["targets"].to(torch.bool)
            self._offsets = [int(offset) for offset in tensors["offsets"]]
            self._lines = [int(line) for line in tensors["lines"]]
        except (KeyError, ValueError, OSError, safetensors.SafetensorError) as error:
            raise DatasetError(f"the tokenized dataset cannot be read: {error}") from error
        if len(self._offsets) != len(self._lines) + 1 or self._offsets[-1] != len(self._tokens):
            raise DatasetError("the tokenized dataset is inconsistent: offsets do not cover the tokens")
        if min(self.lengths, default=1) < 1:
            raise DatasetError("the tokenized dataset is inconsistent: an example has no tokens")
        if len(self._tokens) and int(self._tokens.min()) < 0:
            raise DatasetError("the tokenized dataset has a negative token id")

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [end - start for start, end in pairwise(self._offsets)]

    def line(self, idx: int) -> int:
        """The 1-based line of the JSONL file that an example came from."""
        return self._lines[idx]

    @property
    def max_token_id(self) -> int:
        """Largest token id, to check against the vocabulary."""
        return int(self._tokens.max()) if len(self._tokens) else 0

    def __getitem__(self, idx: int) -> Example:
        start, end = self._offsets[idx], self._offsets[idx + 1]
        tokens = self._tokens[start:end]
        labels = torch.full_like(tokens, IGNORED)
        targets = self._targets[start + 1 : end]
        labels[:-1][targets] = tokens[1:][targets]
        return Example(idx=idx, line=self._lines[idx], tokens=tokens, labels=labels)


def examples_of_step(num_examples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the examples of optimizer step `step` (from 0): a fresh seeded permutation every epoch.

    A pure function of its arguments, so that a resumed job sees exactly the data that it would have seen.
    """
    steps_per_epoch = -(-num_examples // batch_size)
    epoch, step_in_epoch = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order: list[int] = torch.randperm(num_examples, generator=generator).tolist()
    return order[step_in_epoch * batch_size : (step_in_epoch + 1) * batch_size]
