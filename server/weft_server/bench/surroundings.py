"""What a measurement depends on besides the code that is measured: hardware, versions, commit."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_LIBRARIES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "tokenizers",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "vllm",
    "redis",
)
_INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
)


def hardware() -> dict[str, Any]:
    """CPU model, cores that this process may use, its vector instruction sets, memory, and the GPU
    if there is one."""
    fields = _cpu_fields()
    flags = set(fields.get("flags", fields.get("features", "")).split())
    facts: dict[str, Any] = {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cores": num_cores(),
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    gpu = _gpu()
    return facts if gpu is None else {**facts, "gpu": gpu}


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def versions() -> dict[str, str]:
    """Of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        if is_installed(library):
            found[library] = importlib.metadata.version(library)
    return found


def is_installed(library: str) -> bool:
    """Whether a distribution of this name is there (it is not imported)."""
    try:
        importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return False
    return importlib.util.find_spec(library) is not None


def commit() -> str:
    """Commit of the checkout that the code runs from, with `+changes` if it has uncommitted ones other than
    results; `unknown` outside a checkout."""
    sha = _git("rev-parse", "--short=12", "HEAD")
    if sha is None:
        return "unknown"
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return f"{sha}+changes" if changes else sha


def checkout() -> Path | None:
    """Root of the checkout that the code runs from; None where it is installed."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "pyproject.toml").is_file() else None


def _git(*arguments: str) -> str | None:
    root = checkout()
    if root is None:
        return None
    try:
        run = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _cpu_fields() -> dict[str, str]:
    """Fields of the first processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _gpu() -> dict[str, Any] | None:
    if not is_installed("torch"):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": str(torch.version.cuda),
    }
