"""What a batch's heads are rotated and normed with. Values only."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of the rows' positions, `[T, 1, D]` each, contiguous, in the compute dtype; both
    halves of the last axis are equal."""

    cos: Tensor
    sin: Tensor


class HeadNorms(NamedTuple):
    """RMSNorm weights `[D]` of query and key heads."""

    query: Tensor
    key: Tensor
    eps: float
