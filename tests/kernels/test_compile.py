"""Every Triton kernel compiles for real GPUs, and the machine code is sane: the interpreter sees neither."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton")

KERNELS = {
    "shrink_kernel",
    "expand_kernel",
    "weight_grad_kernel",
    "dequantize_kernel",
    "linear_kernel",
    "input_grad_kernel",
}
MAX_SHARED_BYTES = 99 * 1024
"""What one block may use on the consumer variants of sm_80; the data centre parts allow more."""

MAX_STACK_BYTES = 16
"""A few bytes per thread, which the assembler trades for one more resident block; spilling is hundreds."""


def compile_in_subprocess(cache: Path, *arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    program = Path(__file__).with_name("compile_kernels.py")
    result = subprocess.run(
        [sys.executable, str(program), *arguments],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    reports: list[dict[str, Any]] = json.loads(result.stdout)
    return reports


def check(reports: list[dict[str, Any]]) -> None:
    """No spilling, shared memory within limits, and weights loaded 16 bytes at a time."""
    assert {report["kernel"] for report in reports} == KERNELS
    assert {report["capability"] for report in reports} == {80, 90}
    for report in reports:
        assert report["stack_bytes"] <= MAX_STACK_BYTES, report
        assert report["shared_bytes"] <= MAX_SHARED_BYTES, report
        vectors = report["loads"].get(".v4.b32", 0) + report["async_copies"].get("16", 0)
        assert vectors > 0, report
        assert not any(kind.endswith("16") for kind in report["loads"]), report
        # A byte at a time only: the code of a nested scale, one per row of a tile.
        num_byte_loads = sum(count for kind, count in report["loads"].items() if kind.endswith("8"))
        assert num_byte_loads <= 4 * (report["constants"].get("NESTED") == "True"), report


def test_every_kernel_compiles_for_serving_shapes(tmp_path: Path) -> None:
    check(compile_in_subprocess(tmp_path))


@pytest.mark.slow
def test_every_kernel_compiles_for_all_tile_sizes_and_dropout(tmp_path: Path) -> None:
    check(compile_in_subprocess(tmp_path, "--all"))
