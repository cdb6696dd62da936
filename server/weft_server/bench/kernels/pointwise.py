"""What lies between the products: norms, rotation, the cache's writes, the loss head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from weft_server.bench.kernels.case import OpCase, Subject, relative_error
from weft_server.cache.kv import KvCache
from weft_server.model.decoder import rms_norm_backward
from weft_server.model.rope import RotaryTable, apply_rope
from weft_server.training.loss import loss_head

_BLOCK_SIZE = 16


def cases(subject: Subject) -> Iterator[OpCase]:
    """Each over a decode batch where that is where it runs, and over a mixed batch."""
    yield _norm_backward(subject, subject.num_mixed)
    for num_rows in (subject.num_decode, subject.num_mixed):
        yield _rope(subject, num_rows)
        yield _cache_write(subject, num_rows)
    yield _loss_head(subject, 256)


def _norm_backward(subject: Subject, num_rows: int) -> OpCase:
    config = subject.model.config
    x, dy = (
        subject.randn(num_rows, config.hidden_size),
        subject.randn(num_rows, config.hidden_size, scale=0.5),
    )
    weight, eps = 1.0 + subject.randn(config.hidden_size, scale=0.1), config.rms_norm_eps

    def defined(dtype: torch.dtype) -> Tensor:
        leaf = x.detach().to(dtype).requires_grad_()
        with torch.enable_grad():
            y = F.rms_norm(leaf, (config.hidden_size,), weight.to(dtype), eps)
        return torch.autograd.grad(y, leaf, dy.to(dtype))[0]

    return OpCase(
        op="norm backward",
        shape=f"{num_rows}x{config.hidden_size}",
        num_bytes=3 * x.nbytes + weight.nbytes,
        flops=8.0 * x.numel(),
        run=lambda: rms_norm_backward(x, weight, dy, eps),
        error=lambda: relative_error(rms_norm_backward(x, weight, dy, eps), defined(torch.float32)),
        peers={"torch autograd, forward included": lambda: defined(subject.dtype)},
    )


def _rope(subject: Subject, num_rows: int) -> OpCase:
    config = subject.model.config
    heads = config.num_heads + config.num_kv_heads
    qk = subject.randn(num_rows, heads, config.head_dim)
    table = RotaryTable(config, max_positions=num_rows, dtype=subject.dtype, device=subject.device)
    cos, sin = table.at(torch.arange(num_rows, device=subject.device))

    def defined() -> Tensor:
        """As complex numbers: each pair (i, i + D/2) turned by its angle."""
        half = config.head_dim // 2
        pairs = torch.complex(qk[..., :half].float(), qk[..., half:].float())
        turned = pairs * torch.complex(cos[..., :half].float(), sin[..., :half].float())
        return torch.cat((turned.real, turned.imag), dim=-1)

    return OpCase(
        op="rope",
        shape=f"{num_rows} rows, {heads} heads",
        num_bytes=2 * qk.nbytes + cos.nbytes + sin.nbytes,
        flops=3.0 * qk.numel(),
        run=lambda: apply_rope(qk, cos, sin),
        error=lambda: relative_error(apply_rope(qk, cos, sin), defined()),
    )


def _cache_write(subject: Subject, num_rows: int) -> OpCase:
    config = subject.model.config
    cache = KvCache(
        num_layers=1,
        num_blocks=-(-4 * num_rows // _BLOCK_SIZE),
        block_size=_BLOCK_SIZE,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=subject.dtype,
        device=subject.device,
    )
    k = subject.randn(num_rows, config.num_kv_heads, config.head_dim)
    v = subject.randn(num_rows, config.num_kv_heads, config.head_dim, scale=0.5)
    slots = torch.arange(num_rows, device=subject.device) * 3

    def error() -> float:
        cache.write(0, slots, k, v)
        stored = [tensor[0].flatten(0, 1)[slots] for tensor in (cache.keys, cache.values)]
        return max(relative_error(stored[0], k), relative_error(stored[1], v))

    return OpCase(
        op="write to the cache",
        shape=f"{num_rows} rows",
        num_bytes=2 * (k.nbytes + v.nbytes),
        flops=0.0,
        run=lambda: cache.write(0, slots, k, v),
        error=error,
    )


def _loss_head(subject: Subject, num_rows: int) -> OpCase:
    config = subject.model.config
    hidden = subject.randn(num_rows, config.hidden_size)
    norm = 1.0 + subject.randn(config.hidden_size, scale=0.1)
    head = subject.randn(config.vocab_size, config.hidden_size, scale=0.02)
    labels = torch.arange(num_rows, device=subject.device) % config.vocab_size
    rows = torch.arange(num_rows, device=subject.device)
    eps = config.rms_norm_eps

    def defined(dtype: torch.dtype) -> Tensor:
        leaf = hidden.detach().to(dtype).requires_grad_()
        with torch.enable_grad():
            normed = F.rms_norm(leaf, (config.hidden_size,), norm.to(dtype), eps)
            loss = F.cross_entropy(F.linear(normed, head.to(dtype)).float(), labels, reduction="sum")
        return torch.autograd.grad(loss, leaf)[0]

    return OpCase(
        op="loss head, loss and gradient",
        shape=f"{num_rows} rows, {config.vocab_size} tokens",
        num_bytes=2 * head.nbytes + 2 * hidden.nbytes,
        flops=4.0 * num_rows * head.numel(),
        run=lambda: loss_head(hidden, labels, rows, norm, head, eps=eps),
        error=lambda: relative_error(
            loss_head(hidden, labels, rows, norm, head, eps=eps).d_hidden, defined(torch.float32)
        ),
        peers={"torch autograd": lambda: defined(subject.dtype)},
    )
