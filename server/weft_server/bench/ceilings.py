"""What the hardware gives at most, measured in the same run: memory, matrix products, the host link.

Rooflines are drawn with these rather than with a data sheet's numbers, which no program reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from weft_server.bench.stats import Stopwatch, interleave

_BUFFER_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_GEMM_SIZES = {
    "cpu": ((512, 2048, 2048), (1024, 1024, 4096)),
    "cuda": ((4096, 8192, 8192), (8192, 8192, 8192)),
}
_LINK_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes a second read from memory, floating-point operations a second of a large product in `dtype`, and
    bytes a second from pinned host memory to the device (None on a CPU)."""

    read_bytes_per_s: float
    gemm_flops_per_s: float
    link_bytes_per_s: float | None
    dtype: str

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The roofline: the longer of moving the bytes and computing the operations."""
        return max(num_bytes / self.read_bytes_per_s, flops / self.gemm_flops_per_s)

    def best_of(self, other: Ceilings) -> Ceilings:
        """Each ceiling's better measurement of two on the same machine."""
        link = self.link_bytes_per_s
        return Ceilings(
            max(self.read_bytes_per_s, other.read_bytes_per_s),
            max(self.gemm_flops_per_s, other.gemm_flops_per_s),
            None if link is None or other.link_bytes_per_s is None else max(link, other.link_bytes_per_s),
            self.dtype,
        )

    def rows(self) -> list[tuple[str, float | None, str]]:
        """Name, value and unit of each ceiling."""
        link = None if self.link_bytes_per_s is None else self.link_bytes_per_s / 1e9
        return [
            ("memory read", self.read_bytes_per_s / 1e9, "GB/s"),
            (f"{self.dtype} matrix product", self.gemm_flops_per_s / 1e12, "TFLOP/s"),
            ("host to device, pinned", link, "GB/s"),
        ]


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, budget_s: float) -> Ceilings:
    """Measure with the current number of threads; the best sample counts, as a ceiling is a best case."""
    stopwatch = Stopwatch(device)

    def best(call: Callable[[], object]) -> float:
        return min(interleave({"": call}, stopwatch.seconds, budget_s=budget_s / 6, min_rounds=3)[""])

    buffer = torch.ones(_BUFFER_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(buffer)
    read = buffer.nbytes / best(buffer.sum)
    copied = 2 * buffer.nbytes / best(lambda: target.copy_(buffer))
    rates = []
    for m, n, k in _GEMM_SIZES[device.type]:
        a = torch.randn(m, k, dtype=torch.float32, device=device).to(dtype)
        b = torch.randn(n, k, dtype=torch.float32, device=device).to(dtype)
        rates.append(2.0 * m * n * k / best(partial(torch.nn.functional.linear, a, b)))
    link = None
    if device.type == "cuda":
        host = torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True)
        on_device = torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device)
        link = host.nbytes / best(lambda: on_device.copy_(host, non_blocking=True))
    return Ceilings(max(read, copied), max(rates), link, str(dtype).removeprefix("torch."))
