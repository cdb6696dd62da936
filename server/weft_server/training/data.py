"""Tokenized datasets and the order in which a job sees them.

A dataset is a safetensors blob, made when the job was validated, with `tokens` int32 `[total]`, `targets`
uint8 `[total]` (1 where the token is to be predicted), `offsets` int64 `[n + 1]` and `lines` int32 `[n]` (the
1-based line of the JSONL file that each example came from).
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """Read-only access to the examples of a tokenized dataset; `lengths` are their tokens."""

    def __init__(self, blob: bytes) -> None:
        try:
            tensors = safetensors.torch.load(blob)
            self._tokens = tensors["tokens"].to(torch.int64)
            self._targets = tensors["targets"].to(torch.bool)
            # `tolist`, and no loop over tensors: this runs beside the engine's loop.
            self._offsets: list[int] = tensors["offsets"].tolist()
            self._lines: list[int] = tensors["lines"].tolist()
            self.lengths: list[int] = tensors["offsets"].diff().tolist()
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


class ExampleOrder:
    """In which order a job sees its examples: a fresh seeded permutation every epoch.

    What a step gets is a pure function of the arguments and the step, so that a resumed job sees exactly the
    data that it would have seen. The permutation of the last epoch asked for is kept.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        self._num_examples = num_examples
        self._batch_size = batch_size
        self._seed = seed
        self._epoch: int | None = None
        self._order = torch.empty(0, dtype=torch.int64)

    def of_step(self, step: int) -> list[int]:
        """Indices of the examples of optimizer step `step` (from 0)."""
        steps_per_epoch = -(-self._num_examples // self._batch_size)
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
            self._order = torch.randperm(self._num_examples, generator=generator)
            self._epoch = epoch
        first = step_in_epoch * self._batch_size
        examples: list[int] = self._order[first : first + self._batch_size].tolist()
        return examples
