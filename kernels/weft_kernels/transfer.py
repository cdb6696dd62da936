"""Small tensors between host and device, without making the host wait.

`torch.tensor(values, device="cuda")` copies from pageable memory and so blocks until the device has caught up
with everything issued before, and so does `.tolist()`. What an iteration needs on the device, and what it
brings back, goes through here instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a `[len(values)]` tensor; on a GPU the copy is only issued, from pinned memory."""
    if device.type == "cuda":
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
    return torch.tensor(values, dtype=dtype, device=device)


def upload_indices(values: Sequence[int], device: torch.device) -> Tensor:
    """`upload` as int64."""
    return upload(values, torch.int64, device)


def upload_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device` (itself on a CPU); on a GPU the copy is only issued, from pinned memory."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def download(tensor: Tensor) -> Tensor:
    """A tensor on the host (itself on a CPU); on a GPU the copy is only issued, into pinned memory: complete
    once an event that is recorded afterwards on the current stream has passed."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
