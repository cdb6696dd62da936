"""From numbers on the host to a tensor on the device, without making the host wait.

`torch.tensor(values, device="cuda")` copies from pageable memory and so blocks until the device has caught up
with everything issued before. Index and parameter tensors of an iteration come from here instead.
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
