"""What lies between the products: norms, rotation with cache writes, SwiGLU, the loss head, sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels.norm import add_rms_norm, rms_norm_backward
from weft_kernels.rope import KvSlots, Rotation, rotate_backward, write_rotated
from weft_kernels.sampling import draw
from weft_kernels.swiglu import swiglu, swiglu_backward
from weft_server.bench.kernels.case import OpCase, Subject, relative_error
from weft_server.cache.kv import KvCache
from weft_server.model.rope import RotaryTable
from weft_server.training.loss import loss_head

_BLOCK_SIZE = 16


def cases(subject: Subject) -> Iterator[OpCase]:
    """Forward over a decode batch and a mixed batch, backward over a mixed batch."""
    for num_rows in (subject.num_decode, subject.num_mixed):
        yield _norm(subject, num_rows)
        yield _rope(subject, num_rows)
        yield _swiglu(subject, num_rows)
    yield _norm_backward(subject, subject.num_mixed)
    yield _rope_backward(subject, subject.num_mixed)
    yield _swiglu_backward(subject, subject.num_mixed)
    yield _loss_head(subject, 256)
    yield _draw(subject, subject.num_decode)


def _norm(subject: Subject, num_rows: int) -> OpCase:
    config = subject.model.config
    x, residual = (subject.randn(num_rows, config.hidden_size, scale=s) for s in (1.0, 0.5))
    weight, eps = 1.0 + subject.randn(config.hidden_size, scale=0.1), config.rms_norm_eps
    before = x.clone()

    def error() -> float:
        x.copy_(before)
        actual = add_rms_norm(x, residual, weight, eps)
        total = (before + residual).float()
        defined = F.rms_norm(total, (config.hidden_size,), weight.float(), eps)
        return max(relative_error(actual, defined), relative_error(x, total))

    return OpCase(
        op="norm, after adding the residual",
        shape=f"{num_rows}x{config.hidden_size}",
        num_bytes=4 * x.nbytes + weight.nbytes,
        flops=5.0 * x.numel(),
        run=lambda: add_rms_norm(x, residual, weight, eps),
        error=error,
        peers={"torch": lambda: F.rms_norm(x.add_(residual), (config.hidden_size,), weight, eps)},
    )


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


@dataclass(frozen=True, slots=True)
class _Heads:
    """A fused projection's rows, their rotation, and a place for their keys and values."""

    qkv: Tensor
    rotation: Rotation
    slots: KvSlots

    @staticmethod
    def build(subject: Subject, num_rows: int) -> _Heads:
        config, device = subject.model.config, subject.device
        num_heads = config.num_heads + 2 * config.num_kv_heads
        cache = KvCache(
            num_layers=1,
            num_blocks=-(-4 * num_rows // _BLOCK_SIZE),
            block_size=_BLOCK_SIZE,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=subject.dtype,
            device=device,
        )
        table = RotaryTable(config, max_positions=num_rows, dtype=subject.dtype, device=device)
        return _Heads(
            subject.randn(num_rows, num_heads * config.head_dim),
            table.at(torch.arange(num_rows, device=device)),
            KvSlots(cache.keys[0], cache.values[0], torch.arange(num_rows, device=device) * 3),
        )

    def turn(self, heads: Tensor, *, back: bool = False) -> Tensor:
        """The definition: each pair (i, i + D/2) as a complex number, turned by its angle; fp32."""
        half = heads.shape[-1] // 2
        pairs = torch.complex(heads[..., :half].float(), heads[..., half:].float())
        sin = -self.rotation.sin if back else self.rotation.sin
        turned = pairs * torch.complex(self.rotation.cos[..., :half].float(), sin[..., :half].float())
        return torch.cat((turned.real, turned.imag), dim=-1)


def _rope(subject: Subject, num_rows: int) -> OpCase:
    config, heads = subject.model.config, _Heads.build(subject, num_rows)
    sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]

    def error() -> float:
        actual = write_rotated(heads.qkv, heads.rotation, None, heads.slots)
        q, k, v = heads.qkv.view(num_rows, -1, config.head_dim).split(sizes, dim=1)  # type: ignore[no-untyped-call]
        caches = (heads.slots.keys, heads.slots.values)
        stored = [cache.flatten(0, 1)[heads.slots.slot_mapping] for cache in caches]
        return max(
            relative_error(actual, heads.turn(q)),
            relative_error(stored[0], heads.turn(k)),
            relative_error(stored[1], v),
        )

    return OpCase(
        op="rope and write to the cache",
        shape=f"{num_rows} rows, {config.num_heads} + {config.num_kv_heads} heads",
        num_bytes=2 * heads.qkv.nbytes + heads.rotation.cos.nbytes + heads.rotation.sin.nbytes,
        flops=3.0 * heads.qkv.numel(),
        run=lambda: write_rotated(heads.qkv, heads.rotation, None, heads.slots),
        error=error,
    )


def _rope_backward(subject: Subject, num_rows: int) -> OpCase:
    config, heads = subject.model.config, _Heads.build(subject, num_rows)
    d_q = subject.randn(num_rows, config.num_heads, config.head_dim)
    # Accumulators of keys and values are fp32.
    d_k, d_v = (
        subject.randn(num_rows, config.num_kv_heads, config.head_dim, scale=s).float() for s in (1.0, 0.5)
    )

    def run() -> Tensor:
        return rotate_backward(heads.qkv, heads.rotation, None, d_q, d_k, d_v)

    def defined() -> Tensor:
        parts = (heads.turn(d_q, back=True), heads.turn(d_k, back=True), d_v)
        return torch.cat(parts, dim=1).flatten(1)

    return OpCase(
        op="rope backward",
        shape=f"{num_rows} rows, {config.num_heads} + {config.num_kv_heads} heads",
        num_bytes=d_q.nbytes + d_k.nbytes + d_v.nbytes + heads.qkv.nbytes,
        flops=3.0 * heads.qkv.numel(),
        run=run,
        error=lambda: relative_error(run(), defined()),
    )


def _swiglu(subject: Subject, num_rows: int) -> OpCase:
    width = subject.model.config.intermediate_size
    gate_up = subject.randn(num_rows, 2 * width)

    def defined(dtype: torch.dtype) -> Tensor:
        gate, up = gate_up.to(dtype).chunk(2, dim=1)
        return F.silu(gate) * up

    return OpCase(
        op="swiglu",
        shape=f"{num_rows}x{width}",
        num_bytes=1.5 * gate_up.nbytes,
        flops=5.0 * num_rows * width,
        run=lambda: swiglu(gate_up),
        error=lambda: relative_error(swiglu(gate_up), defined(torch.float32)),
        peers={"torch": lambda: defined(subject.dtype)},
    )


def _swiglu_backward(subject: Subject, num_rows: int) -> OpCase:
    width = subject.model.config.intermediate_size
    gate_up, d_product = subject.randn(num_rows, 2 * width), subject.randn(num_rows, width)

    def defined(dtype: torch.dtype) -> Tensor:
        leaf = gate_up.detach().to(dtype).requires_grad_()
        with torch.enable_grad():
            gate, up = leaf.chunk(2, dim=1)
            product = F.silu(gate) * up
        return torch.autograd.grad(product, leaf, d_product.to(dtype))[0]

    return OpCase(
        op="swiglu backward",
        shape=f"{num_rows}x{width}",
        num_bytes=2 * gate_up.nbytes + d_product.nbytes,
        flops=12.0 * num_rows * width,
        run=lambda: swiglu_backward(gate_up, d_product),
        error=lambda: relative_error(swiglu_backward(gate_up, d_product), defined(torch.float32)),
        peers={"torch autograd, forward included": lambda: defined(subject.dtype)},
    )


def _draw(subject: Subject, num_rows: int) -> OpCase:
    vocab_size = subject.model.config.vocab_size
    scores = 2.0 * subject.randn(num_rows, vocab_size).float()
    uniforms = (torch.arange(num_rows, device=subject.device) + 0.5).double() / num_rows

    def error() -> float:
        """How far the uniform numbers lie outside the drawn tokens' intervals of the distribution."""
        drawn = draw(scores, uniforms).unsqueeze(1)
        cumulative = torch.softmax(scores.double(), dim=1).cumsum(1)
        upper = cumulative.gather(1, drawn).squeeze(1)
        lower = upper - torch.softmax(scores.double(), dim=1).gather(1, drawn).squeeze(1)
        return float(torch.maximum(lower - uniforms, uniforms - upper).clamp(min=0.0).max())

    return OpCase(
        op="draw tokens",
        shape=f"{num_rows} rows, {vocab_size} tokens",
        num_bytes=scores.nbytes,
        flops=3.0 * scores.numel(),
        run=lambda: draw(scores, uniforms),
        error=error,
        peers={"torch.multinomial": lambda: torch.multinomial(torch.softmax(scores, dim=1), 1)},
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
