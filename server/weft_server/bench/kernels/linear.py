"""Frozen linear layers in every format: `QuantizedLinear.forward` and `input_grad`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from weft_server.bench.kernels.case import Call, OpCase, Subject, relative_error
from weft_server.bench.surroundings import is_installed
from weft_server.model.loading import Quantization
from weft_server.quant.linear import QuantizedLinear

FORMATS: tuple[Quantization, ...] = ("none", "nf4", "int8")


def cases(subject: Subject) -> Iterator[OpCase]:
    """One row, a decode batch, a few windows and a mixed batch, forward; the larger ones backward."""
    for quantization in FORMATS:
        # Packed weights stay packed, on a CPU too: their kernels are what is measured.
        is_packed = quantization != "none"
        layer = subject.model.weft_weights(quantization, low_memory=is_packed).layers[0]
        for name, linear in (
            ("qkv", layer.qkv),
            ("o", layer.o),
            ("gate, up", layer.gate_up),
            ("down", layer.down),
        ):
            for num_rows in (1, subject.num_decode, 64, subject.num_mixed):
                yield _forward(
                    subject, f"{name} {linear.out_features}x{linear.in_features}", linear, num_rows
                )
            for num_rows in (64, subject.num_mixed):
                yield _input_grad(
                    subject, f"{name} {linear.out_features}x{linear.in_features}", linear, num_rows
                )


def _forward(subject: Subject, name: str, linear: QuantizedLinear, num_rows: int) -> OpCase:
    x = subject.randn(num_rows, linear.in_features)
    return OpCase(
        op=f"linear {_format(linear)}",
        shape=f"{name}, {num_rows} rows",
        num_bytes=linear.nbytes + num_rows * (linear.in_features + linear.out_features) * x.element_size(),
        flops=2.0 * num_rows * linear.in_features * linear.out_features,
        run=lambda: linear.forward(x),
        error=lambda: relative_error(linear.forward(x), _defined(linear, x)),
        peers=_peers(linear, x),
    )


def _input_grad(subject: Subject, name: str, linear: QuantizedLinear, num_rows: int) -> OpCase:
    dy = subject.randn(num_rows, linear.out_features)
    dense = linear.weight_dense() if linear.packed is None else None
    return OpCase(
        op=f"linear {_format(linear)}, input gradient",
        shape=f"{name}, {num_rows} rows",
        num_bytes=linear.nbytes + num_rows * (linear.in_features + linear.out_features) * dy.element_size(),
        flops=2.0 * num_rows * linear.in_features * linear.out_features,
        run=lambda: linear.input_grad(dy),
        error=lambda: relative_error(linear.input_grad(dy), dy.float() @ linear.weight_dense().float()),
        peers={} if dense is None else {"torch": lambda: dy @ dense},
    )


def _defined(linear: QuantizedLinear, x: Tensor) -> Tensor:
    """The product and the bias in fp32, on the weight's values."""
    y = x.float() @ linear.weight_dense().float().t()
    return y if linear.bias is None else y + linear.bias.float()


def _format(linear: QuantizedLinear) -> str:
    return "dense" if linear.packed is None else linear.format


def _peers(linear: QuantizedLinear, x: Tensor) -> dict[str, Call | None]:
    if linear.packed is None:
        dense = linear.weight_dense()
        return {"torch": lambda: F.linear(x, dense, linear.bias)}
    if linear.format == "nf4":
        return {"bitsandbytes": _bitsandbytes(linear, x)}
    return {}


def _bitsandbytes(linear: QuantizedLinear, x: Tensor) -> Call | None:
    """The same matrix quantized by bitsandbytes, by its public product (a kernel of its own for one row)."""
    if not is_installed("bitsandbytes"):
        return None
    import bitsandbytes
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        linear.weight_dense(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )

    def product() -> object:
        with torch.no_grad():
            return bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state, bias=linear.bias)

    return product
