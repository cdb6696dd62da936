"""Every Triton kernel compiles for real GPUs, and the machine code is sane: the interpreter sees neither."""

import ast
import hashlib
import json
import linecache
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton")

PACKAGE = Path(__file__).parents[2] / "kernels/weft_kernels"
MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""What one block may use of an A100 and of an H100."""

VECTOR_BYTES = 16
"""The widest load of a thread. A load whose program has as much for each of its threads must be this wide."""


def compile_kernels(cache: Path, *arguments: str) -> dict[str, Any]:
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
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def problems(report: dict[str, Any]) -> list[str]:
    """What is wrong with the machine code, a line each; and exceptions for kernels that there are not."""
    found: dict[str, None] = {}
    for launch in report["launches"]:
        where = f"{launch['op']}.{launch['kernel']} on sm_{launch['capability']} with {launch['constants']}"
        for text in launch_problems(launch, report):
            found[f"{text}: {where}"] = None
    names = {launch["kernel"] for launch in report["launches"]}
    for kind in ("narrow_loads", "stack_bytes"):
        for name in report[kind].keys() - names:
            found[f"{kind} of a kernel that is not launched: {name}"] = None
    return list(found)


def launch_problems(launch: dict[str, Any], report: dict[str, Any]) -> Iterator[str]:
    shared, limit = launch["shared_bytes"], MAX_SHARED_BYTES[launch["capability"]]
    if shared > limit:
        yield f"{shared} bytes of shared memory, {limit} are there"
    allowed, _ = report["stack_bytes"].get(launch["kernel"], (0, ""))
    if launch["stack_bytes"] > allowed or (launch["num_local_accesses"] and not allowed):
        yield (
            f"spills {launch['stack_bytes']} bytes a thread ({allowed} allowed), "
            f"with {launch['num_registers']} registers; {launch['num_local_accesses']} instructions move them"
        )
    for load in launch["loads"]:
        source = linecache.getline(load["file"], load["line"]).strip()
        excused = any(piece in source for piece in report["narrow_loads"].get(launch["kernel"], {}))
        narrow = [width for width in load["widths"] if width < VECTOR_BYTES]
        tile_bytes = load["tile_bytes"]
        is_tile = tile_bytes is None or tile_bytes >= VECTOR_BYTES * launch["num_threads"]
        if narrow and is_tile and not excused:
            yield f"loads {narrow} bytes at a time in {load['file']}:{load['line']}, `{source}`"


def unneeded_exceptions(report: dict[str, Any]) -> list[str]:
    """Declared exceptions without which `problems` would find no more."""
    needed = len(problems(report))
    unneeded = []
    for kernel, pieces in report["narrow_loads"].items():
        for piece in pieces:
            rest = {key: value for key, value in pieces.items() if key != piece}
            without = report | {"narrow_loads": report["narrow_loads"] | {kernel: rest}}
            unneeded += [f"{kernel}: {piece}"] if len(problems(without)) == needed else []
    for kernel in report["stack_bytes"]:
        rest = {key: value for key, value in report["stack_bytes"].items() if key != kernel}
        unneeded += [kernel] if len(problems(report | {"stack_bytes": rest})) == needed else []
    return unneeded


def kernel_names() -> set[str]:
    """Every `@triton.jit` function of the package that is called `*_kernel`."""
    return {
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    }


@pytest.fixture(scope="module")
def cache(pytestconfig: pytest.Config) -> Path:
    """Kept from run to run: Triton names what it compiled after source, options and its own version.

    Not after the file, which compiled code names; so files that move get a cache of their own.
    """
    assert pytestconfig.cache is not None
    paths = "".join(str(path) for path in sorted(PACKAGE.rglob("*.py")))
    return pytestconfig.cache.mkdir(f"triton-{hashlib.sha256(paths.encode()).hexdigest()[:8]}")


def test_every_kernel_compiles_to_sane_code_for_serving_shapes(cache: Path) -> None:
    report = compile_kernels(cache)
    assert {launch["kernel"] for launch in report["launches"]} == kernel_names()
    assert {launch["capability"] for launch in report["launches"]} == set(MAX_SHARED_BYTES)
    assert not problems(report), "\n".join(problems(report))


@pytest.mark.slow
def test_every_kernel_compiles_to_sane_code_for_all_tile_sizes_and_options(cache: Path) -> None:
    report = compile_kernels(cache, "--all")
    assert not problems(report), "\n".join(problems(report))
    assert not unneeded_exceptions(report)


BAD_KERNELS = """
import sys
import torch
import triton
import triton.language as tl

MODULES = (sys.modules[__name__],)

@triton.jit
def strided_kernel(x, y):
    i = tl.arange(0, 4096)
    tl.store(y + i, tl.load(x + i * 3))

@triton.jit
def spilling_kernel(x, y):
    i = tl.arange(0, 64)
    tile = tl.load(x + i[:, None] * 64 + i[None, :])
    tl.store(y + i[:, None] * 64 + i[None, :], tl.dot(tile, tile, input_precision="ieee"))

def launch(every):
    x = torch.empty(4096, device="meta")
    strided_kernel[(1,)](x, x, num_warps=4)
    spilling_kernel[(1,)](x, x, num_warps=1, maxnreg=32)
"""


def test_the_gate_finds_strided_loads_and_spills(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(BAD_KERNELS)
    found = problems(compile_kernels(tmp_path / "cache", "--launches", str(tmp_path)))
    strided = [text for text in found if "bad.strided_kernel" in text]
    assert [text.startswith("loads [4] bytes at a time in") for text in strided] == [True, True]
    assert all("`tl.store(y + i, tl.load(x + i * 3))`" in text for text in strided)
    assert any(text.startswith("spills") and "bad.spilling_kernel on sm_90" in text for text in found)


def test_the_gate_finds_too_much_shared_memory_and_exceptions_for_no_kernel() -> None:
    launch = {
        "op": "bad",
        "kernel": "greedy_kernel",
        "constants": {},
        "stack_bytes": 0,
        "num_local_accesses": 0,
        "loads": [],
    }
    launches = [launch | {"capability": c, "shared_bytes": 200 * 1024} for c in MAX_SHARED_BYTES]
    found = problems({"launches": launches, "narrow_loads": {}, "stack_bytes": {"gone_kernel": (8, "why")}})
    assert found == [
        "204800 bytes of shared memory, 166912 are there: bad.greedy_kernel on sm_80 with {}",
        "stack_bytes of a kernel that is not launched: gone_kernel",
    ]
