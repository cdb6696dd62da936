"""float32 products of matrices that hold bf16 values.

Owns the setting of the CPU library that admits them to its bf16 units. Knows no operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def bf16_valued(dtype: torch.dtype) -> Iterator[None]:
    """Within, float32 matrix products on a CPU may round their factors to bf16, if `dtype` is bf16.

    Sums stay float32. So where all factors were bf16 and have been widened, products are as exact as before;
    the library's own float32 product is about three times as fast at low ranks as the BLAS that is called
    otherwise, and processors with bf16 units compute it there. The setting is the process's: no other thread
    may multiply float32 matrices meanwhile. Without effect where PyTorch does not offer it.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if dtype != torch.bfloat16 or not hasattr(matmul, "fp32_precision"):
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
