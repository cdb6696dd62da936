"""What each side of Weft can be imported without.

The engine's side runs where torch, triton, numpy, safetensors and tokenizers are installed and nothing else
of what Weft depends on; the API's side starts without loading torch; the scheduler needs only Python.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

ON_THE_BOX = {"torch", "triton", "numpy", "safetensors", "tokenizers"}
# Import names of distributions where they differ from the distribution's, or are several.
IMPORT_NAMES = {
    "fastapi": ("fastapi", "starlette"),
    "pydantic": ("pydantic", "pydantic_core"),
    "python-multipart": ("python_multipart", "multipart"),
    "pyzmq": ("zmq",),
}

IMPORT_WITHOUT = """
import importlib, json, sys
request = json.load(sys.stdin)
sys.path[:0] = request["path"]
sys.modules.update(dict.fromkeys(request["absent"]))
failures = {}
for module in request["modules"]:
    try:
        importlib.import_module(module)
    except Exception as error:
        failures[module] = repr(error)
json.dump(failures, sys.stdout)
"""


def failed_imports(
    modules: Iterable[str], *, absent: Iterable[str], flags: Iterable[str] = (), path: Iterable[Path] = ()
) -> dict[str, str]:
    """Imports the modules in a new interpreter that lacks others; the failures and their errors."""
    request = {"modules": sorted(modules), "absent": sorted(absent), "path": [str(entry) for entry in path]}
    run = subprocess.run(
        [sys.executable, *flags, "-c", IMPORT_WITHOUT],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    failures: dict[str, str] = json.loads(run.stdout)
    return failures


def modules_of(folder: Path, package: str) -> set[str]:
    """Names of a package in a source folder and of all modules in it."""
    files = (folder / package.replace(".", "/")).rglob("*.py")
    names = {".".join(file.relative_to(folder).with_suffix("").parts) for file in files}
    assert names
    return {name.removesuffix(".__init__") for name in names}


def absent_from_the_box(root: Path) -> set[str]:
    """Import names of Weft's dependencies other than those on the box."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    matches = (re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in project["dependencies"])
    distributions = {match.group() for match in matches if match} - ON_THE_BOX
    assert {"fastapi", "pyzmq", "redis", "rich"} <= distributions
    return {name for dist in distributions for name in IMPORT_NAMES.get(dist, (dist.replace("-", "_"),))}


def test_engine_training_and_kernels_import_on_a_bare_gpu_box(root: Path) -> None:
    modules = {"weft_server.engine.engine", "weft_server.engine.build"}
    for package in ("adapters", "cache", "model", "quant", "training"):
        modules |= modules_of(root / "server", f"weft_server.{package}")
    modules |= modules_of(root / "server", "weft_server.bench.coserve")
    modules |= modules_of(root / "kernels", "weft_kernels")
    modules |= modules_of(root / "scheduler", "weft_scheduler")
    assert failed_imports(modules, absent=absent_from_the_box(root)) == {}


def test_benchmarks_of_the_engine_import_on_a_bare_gpu_box(root: Path) -> None:
    # Peers are imported when they are asked for; benchmarks of a server need the web stack.
    modules = modules_of(root / "server", "weft_server.bench")
    modules = {name for name in modules if not name.startswith("weft_server.bench.serve")}
    peers = {"transformers", "peft", "bitsandbytes", "accelerate", "vllm"}
    assert failed_imports(modules, absent=absent_from_the_box(root) | peers) == {}


def test_the_api_side_imports_without_torch(root: Path) -> None:
    modules = {"weft_server.cli", "weft_server.config"}
    for package in ("api", "service", "store"):
        modules |= modules_of(root / "server", f"weft_server.{package}")
    assert failed_imports(modules, absent=("torch", "triton", "weft_kernels")) == {}


def test_the_scheduler_imports_with_the_standard_library_alone(root: Path) -> None:
    # -I and -S: neither site-packages nor anything of the environment is on the path.
    modules = modules_of(root / "scheduler", "weft_scheduler")
    assert failed_imports(modules, absent=(), flags=("-I", "-S"), path=[root / "scheduler"]) == {}


def test_an_import_of_something_absent_is_noticed() -> None:
    assert failed_imports(["json", "redis.asyncio"], absent=["redis"]).keys() == {"redis.asyncio"}
    assert failed_imports(["json", "pytest"], absent=(), flags=("-I", "-S")).keys() == {"pytest"}
