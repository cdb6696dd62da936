"""Bytes that a finetuning token keeps between its forward and the end of its backward, from the tensors
themselves."""

from __future__ import annotations

import torch

from weft_server.cache.kv import KvCache
from weft_server.model.config import ModelConfig
from weft_server.training.data import Example
from weft_server.training.pack import make_pack

_NUM_TOKENS = 64


def kept_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> dict[str, float]:
    """By part: what a pack allocates in its first window and in one layer's backward, and its place in the
    paged cache."""
    device = torch.device("cpu")
    tokens = torch.zeros(_NUM_TOKENS, dtype=torch.int64)
    pack = make_pack("pack", "job", [Example(0, 1, tokens, tokens)], device=device)
    pack.allocate(config, dtype)
    accumulators = pack.key_gradients(0, (config.num_kv_heads, config.head_dim))
    assert pack.layer_inputs is not None
    assert pack.d_hidden is not None
    sizes = {
        "layer inputs": pack.layer_inputs.nbytes,
        "gradient of the hidden state": pack.d_hidden.nbytes,
        "gradients of one layer's keys and values": sum(tensor.nbytes for tensor in accumulators),
    }
    cached = KvCache.bytes_per_token(
        num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=dtype
    )
    return {**{part: size / _NUM_TOKENS for part, size in sizes.items()}, "keys and values": float(cached)}
