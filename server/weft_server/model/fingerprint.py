"""The fingerprint of a base model, to which adapters are bound.

Owns what counts as "the same base": the function (architecture facts) and the weights' values as stored. Not
part of it: how the files are sharded, which of two tied names is stored, the tokenizer, and the format in
which Weft keeps the weights at run time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from weft_server.model.checkpoint import Checkpoint, open_checkpoint
from weft_server.model.config import ModelConfig
from weft_server.model.weights import DecoderWeights

_FULL_DIGEST_BYTES = 1 << 30
_SAMPLE_BYTES = 1 << 16
_NUM_SAMPLES = 4
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def base_fingerprint(source: Path | DecoderWeights) -> str:
    """SHA-256 (hex) over the architecture facts and every tensor's name, dtype, shape and content.

    The content of a model directory is digested whole up to 1 GiB in all; of larger ones, from every tensor
    four evenly spaced samples of 64 KiB, the first and the last bytes among them (finetuning a base changes
    all of its matrices, so this tells variants apart at 1 % of the reading). In-memory weights (random ones,
    which have no files) have fingerprints of their own kind, sampled alike.

    Raises:
        ModelError: as `ModelConfig.from_directory` and `open_checkpoint`.
    """
    if isinstance(source, DecoderWeights):
        return _fingerprint_weights(source)
    config = ModelConfig.from_directory(source)
    digest = _start(config)
    with open_checkpoint(source) as checkpoint:
        sampled = checkpoint.num_bytes > _FULL_DIGEST_BYTES
        for canonical, name in _canonical_names(config, checkpoint):
            info = checkpoint.info(name)
            digest.update(json.dumps([canonical, info.dtype, info.shape]).encode())
            for piece in _pieces(checkpoint, name, info.num_bytes, sampled):
                digest.update(piece)
    return digest.hexdigest()


def _start(config: ModelConfig) -> hashlib._Hash:
    return hashlib.sha256(json.dumps(config.architecture_facts(), sort_keys=True).encode())


def _canonical_names(config: ModelConfig, checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """(name to digest, stored name) in order; a tied matrix counts once, under the embedding's name."""
    names = {name: name for name in checkpoint.names}
    if config.tie_word_embeddings and _HEAD in names:
        stored = names.pop(_HEAD)
        names.setdefault(_EMBED, stored)
    return sorted(names.items())


def _spans(num_bytes: int, sampled: bool) -> Iterator[tuple[int, int]]:
    """(offset, length) of the bytes to digest."""
    if not sampled or num_bytes <= _NUM_SAMPLES * _SAMPLE_BYTES:
        for offset in range(0, num_bytes, _SAMPLE_BYTES * 64):
            yield offset, min(_SAMPLE_BYTES * 64, num_bytes - offset)
        return
    last = num_bytes - _SAMPLE_BYTES
    for sample in range(_NUM_SAMPLES):
        yield last * sample // (_NUM_SAMPLES - 1), _SAMPLE_BYTES


def _pieces(checkpoint: Checkpoint, name: str, num_bytes: int, sampled: bool) -> Iterator[bytes]:
    for offset, length in _spans(num_bytes, sampled):
        yield checkpoint.read_bytes(name, offset, length)


def _fingerprint_weights(weights: DecoderWeights) -> str:
    digest = _start(weights.config)
    for tensor in _tensors(weights):
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        digest.update(json.dumps([str(tensor.dtype), tuple(tensor.shape)]).encode())
        for offset, length in _spans(flat.numel(), sampled=True):
            digest.update(bytes(flat[offset : offset + length].cpu().numpy()))
    return digest.hexdigest()


def _tensors(weights: DecoderWeights) -> Iterator[Tensor]:
    yield weights.embed
    yield weights.norm
    if weights.lm_head is not weights.embed:
        yield weights.lm_head
    for layer in weights.layers:
        yield layer.input_norm
        yield layer.post_attention_norm
        for linear in layer.linears:
            yield linear.weight_dense()
            if linear.bias is not None:
                yield linear.bias
        for norm in (layer.q_norm, layer.k_norm):
            if norm is not None:
                yield norm
