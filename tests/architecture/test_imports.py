"""Who may import whom: the contracts of pyproject.toml, and which libraries the engine's side may name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp
import pytest

PACKAGES = {"server": "weft_server", "kernels": "weft_kernels", "scheduler": "weft_scheduler"}
TENSORS = {"torch", "triton", "numpy", "safetensors", "tokenizers"}
# The two modules at the engine's rim: one fetches checkpoints from a hub, the other talks to the API process.
RIM = {"weft_server.model.hub": {"huggingface_hub"}, "weft_server.engine.process": {"zmq"}}


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    """Every import statement of the three packages, those inside functions included."""
    return grimp.build_graph(*PACKAGES.values(), include_external_packages=True, cache_dir=None)


def third_party_imports(imports: grimp.ImportGraph, module: str) -> set[str]:
    tops = {name.partition(".")[0] for name in imports.find_modules_directly_imported_by(module)}
    return tops - sys.stdlib_module_names - set(PACKAGES.values())


def test_the_import_contracts_hold(root: Path) -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as lint; lint()",
            "--no-cache",
        ],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert ", 0 broken." in run.stdout
    assert "Contracts: 0 kept" not in run.stdout


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("weft_scheduler", set()),
        ("weft_kernels", {"torch", "triton"}),
        ("weft_server.quant", TENSORS),
        ("weft_server.cache", TENSORS),
        ("weft_server.adapters", TENSORS),
        ("weft_server.model", TENSORS),
        ("weft_server.training", TENSORS),
        ("weft_server.engine", TENSORS),
    ],
)
def test_below_the_engine_only_tensor_libraries_are_imported(
    imports: grimp.ImportGraph, package: str, allowed: set[str]
) -> None:
    modules = {package} | imports.find_descendants(package)
    assert len(modules) > 1
    foreign = {
        module: names
        for module in modules
        if (names := third_party_imports(imports, module) - allowed - RIM.get(module, set()))
    }
    assert foreign == {}


@pytest.mark.parametrize(("folder", "package"), PACKAGES.items())
def test_a_source_folder_is_no_package_itself(root: Path, folder: str, package: str) -> None:
    assert not (root / folder / "__init__.py").exists()
    assert (root / folder / package / "__init__.py").exists()
