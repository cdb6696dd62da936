"""One operator at one shape: what runs, what it must give, and the least that it must move and compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from weft_server.bench.models import RandomModel

Call: TypeAlias = Callable[[], object]

TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-4}
"""Of a result's root mean square error, relative: a few roundings of the dtype."""


@dataclass(frozen=True, slots=True)
class OpCase:
    """A measurement.

    Attributes:
        op: the operator's name.
        shape: what distinguishes this case, in words.
        num_bytes: bytes read and written at least once.
        flops: floating-point operations, a multiplication and its addition as two.
        run: one call.
        error: runs it and returns the relative error against the definition in fp32.
        peers: other implementations by name; None for one that is not to be had here.
        crosses_link: the bytes come from the host.
    """

    op: str
    shape: str
    num_bytes: float
    flops: float
    run: Call
    error: Callable[[], float]
    peers: Mapping[str, Call | None] = field(default_factory=dict)
    crosses_link: bool = False


@dataclass(frozen=True, slots=True)
class Subject:
    """The shape and device that the cases are made for; `model` has a single layer."""

    model: RandomModel
    seed: int

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of computation."""
        return self.model.dtype

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def num_decode(self) -> int:
        """Rows of a typical decode batch, which is also the number of distinct adapters."""
        return 32 if self.on_gpu else 8

    @property
    def num_mixed(self) -> int:
        """Rows of a typical mixed batch."""
        return 2048 if self.on_gpu else 512

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values that depend on seed and shape alone."""
        generator = torch.Generator(self.device).manual_seed(hash((self.seed, *shape)) % 2**31)
        values = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
        return (values * scale).to(self.dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected, in fp32."""
    difference = actual.float() - expected.float()
    return float(difference.square().mean().sqrt() / expected.float().square().mean().sqrt())
