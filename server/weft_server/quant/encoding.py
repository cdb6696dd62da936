"""Encoding a float weight into a QuantizedLinear of a chosen format.

Owns the choice of encoder. Knows nothing of where weights come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft_server.quant import int8, nf4
from weft_server.quant.linear import Format, QuantizedLinear

_ENCODABLE = (torch.float32, torch.float16, torch.bfloat16)


def encode(
    weight: Tensor,
    *,
    format: Format,  # noqa: A002
    dtype: torch.dtype,
    bias: Tensor | None = None,
    expanded: bool = False,
) -> QuantizedLinear:
    """A frozen linear layer with `weight` [N, K], stored in `format`.

    The weight is cast to the compute dtype before it is encoded (to float32 where that is wider), as
    transformers does when it quantizes at load.

    Args:
        weight: any floating dtype, on the device on which the layer is to live.
        format: "none", "nf4" (block 64, double quantization) or "int8" (per output channel).
        dtype: the compute dtype.
        bias: [N] or None.
        expanded: keep only the dense values of the encoded weight.

    Raises:
        ValueError: the weight is not a matrix of finite values.
    """
    if format == "none":
        return QuantizedLinear(weight, dtype=dtype, bias=bias)
    source = weight.to(dtype if dtype in _ENCODABLE else torch.float32)
    packed = nf4.quantize(source) if format == "nf4" else int8.quantize(source)
    return QuantizedLinear(packed, dtype=dtype, bias=bias, expanded=expanded)
