"""Key/value tensors for the block ids that the scheduler hands out. Knows nothing of sequences."""

from __future__ import annotations

import torch


class KvCache:
    """Paged keys and values, one pair of tensors per layer, each `[num_blocks, block_size, Hkv, D]`.

    A token's slot is block id · block size + offset.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.block_size = block_size
        self.num_blocks = num_blocks

    @staticmethod
    def bytes_per_token(*, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one cached token takes over all layers."""
        return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize

    @property
    def bytes_per_layer_token(self) -> int:
        """Bytes that one cached token takes in one layer."""
        keys = self.keys[0]
        return 2 * keys.shape[2] * keys.shape[3] * keys.element_size()
