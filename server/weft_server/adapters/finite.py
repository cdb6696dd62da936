"""Whether a tensor holds nothing but finite numbers, at the speed of memory."""

from __future__ import annotations

from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """False for a NaN or Inf anywhere; `tensor` has at least one element, of any float dtype.

    By its extremes, which a NaN or Inf is or spoils: one pass without a mask of the tensor's size, which
    `isfinite().all()` writes and reads again.
    """
    lowest, highest = tensor.aminmax()
    return bool(lowest.isfinite() & highest.isfinite())
