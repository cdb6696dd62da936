"""The int8 weight format: symmetric codes with one scale per output channel. Encoding is elsewhere."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """A matrix [N, K]: `W[n, k] = codes[n, k] · scales[n]`.

    Attributes:
        codes: int8 [N, K].
        scales: float32 [N].

    Raises:
        ValueError: other shapes or dtypes.
    """

    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        codes, scales = self.codes, self.scales
        if codes.dim() != 2 or codes.dtype != torch.int8:
            raise ValueError(f"codes must be an int8 matrix, got {tuple(codes.shape)} {codes.dtype}")
        if scales.shape != codes.shape[:1] or scales.dtype != torch.float32:
            raise ValueError(f"scales must be float32, one per row, got {tuple(scales.shape)} {scales.dtype}")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str) -> "Int8Weight":
        """The same weight on another device."""
        return Int8Weight(self.codes.to(device), self.scales.to(device))
