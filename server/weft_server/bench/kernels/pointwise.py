"""What lies between the products: norms, rotation, the cache's writes, the loss head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels.norm import rms_norm_backward
from weft_kernels.rope import KvSlots, write_rotated
from weft_server.bench.kernels.case import OpCase, Subject, relative_error
from weft_server.cache.kv import KvCache
from weft_server.model.rope import RotaryTable
from weft_server.training.loss import loss_head

_BLOCK_SIZE = 16


def cases(subject: Subject) -> Iterator[OpCase]:
    """Each over a decode batch where that is where it runs, and over a mixed batch."""
    yield _norm_backward(subject, subject.num_mixed)
    for num_rows in (subject.num_decode, subject.num_mixed):
        yield _rope(subject, num_rows)
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
    num_heads, num_kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    qkv = subject.randn(num_rows, (num_heads + 2 * num_kv_heads) * head_dim)
    table = RotaryTable(config, max_positions=num_rows, dtype=subject.dtype, device=subject.device)
    rotation = table.at(torch.arange(num_rows, device=subject.device))
    cache = KvCache(
        num_layers=1,
        num_blocks=-(-4 * num_rows // _BLOCK_SIZE),
        block_size=_BLOCK_SIZE,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=subject.dtype,
        device=subject.device,
    )
    slot_mapping = torch.arange(num_rows, device=subject.device) * 3
    slots = KvSlots(cache.keys[0], cache.values[0], slot_mapping)

    def defined() -> tuple[Tensor, Tensor, Tensor]:
        """As complex numbers: each pair (i, i + D/2) turned by its angle."""
        heads = qkv.view(num_rows, -1, head_dim)
        q, k, v = torch.split_with_sizes(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        half = head_dim // 2
        angle = torch.complex(rotation.cos[..., :half].float(), rotation.sin[..., :half].float())
        turned = [torch.complex(x[..., :half].float(), x[..., half:].float()) * angle for x in (q, k)]
        q_turned, k_turned = (torch.cat((x.real, x.imag), dim=-1) for x in turned)
        return q_turned, k_turned, v

    def error() -> float:
        q, (q_wanted, k_wanted, v_wanted) = write_rotated(qkv, rotation, None, slots), defined()
        k, v = (tensor[0].flatten(0, 1)[slot_mapping] for tensor in (cache.keys, cache.values))
        pairs = ((q, q_wanted), (k, k_wanted), (v, v_wanted))
        return max(relative_error(computed, wanted) for computed, wanted in pairs)

    return OpCase(
        op="rope and write to the cache",
        shape=f"{num_rows} rows, {num_heads} + {num_kv_heads} heads",
        num_bytes=2 * qkv.nbytes + rotation.cos.nbytes + rotation.sin.nbytes,
        flops=3.0 * num_rows * (num_heads + num_kv_heads) * head_dim,
        run=lambda: write_rotated(qkv, rotation, None, slots),
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
