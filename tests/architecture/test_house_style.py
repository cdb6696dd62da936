"""Rules of the house that neither ruff nor mypy checks."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

SOURCES = ("server", "kernels", "scheduler")
# One letter of each is bracketed so that this file does not contain what it looks for.
UNFINISHED = re.compile(r"\b(?:TOD[O]|FIXM[E]|XX[X])\b")
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|home|root|Users)/")


@pytest.fixture(scope="module")
def texts(repository_files: list[Path]) -> dict[Path, str]:
    """The repository's files that are text."""
    contents = ((path, path.read_bytes()) for path in repository_files)
    return {path: content.decode() for path, content in contents if b"\0" not in content}


@pytest.fixture(scope="module")
def modules(texts: dict[Path, str]) -> dict[Path, ast.Module]:
    """The repository's Python files, parsed."""
    return {path: ast.parse(text) for path, text in texts.items() if path.suffix == ".py"}


def lines_matching(pattern: re.Pattern[str], texts: dict[Path, str], root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{number}: {line.strip()[:100]}"
        for path, text in texts.items()
        if pattern.search(text)
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def environment_reads(module: ast.Module) -> list[int]:
    """Lines that read the process's environment.

    Setting or deleting a variable, and copying the whole for a child (`{**os.environ, ...}`,
    `dict(os.environ, ...)`, `os.environ.copy()`, `os.environ | {...}`) are not reads.
    """
    allowed: set[ast.AST] = set()
    for node in ast.walk(module):
        match node:
            case ast.Dict(keys=keys, values=values):
                allowed |= {value for key, value in zip(keys, values, strict=True) if key is None}
            case ast.Call(func=ast.Name(id="dict"), args=[copied, *_]):
                allowed.add(copied)
            case ast.Call(func=ast.Attribute(value=copied, attr="copy" | "setdefault" | "update")):
                allowed.add(copied)
            case ast.BinOp(left=copied, op=ast.BitOr()):
                allowed.add(copied)
            case ast.Subscript(value=written, ctx=ast.Store() | ast.Del()):
                allowed.add(written)
    lines = []
    for node in ast.walk(module):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr="environ" | "environb") if node not in allowed:
                lines.append(node.lineno)
            case ast.Attribute(value=ast.Name(id="os"), attr="getenv" | "getenvb"):
                lines.append(node.lineno)
            case ast.ImportFrom(module="os", names=names) if any("env" in name.name for name in names):
                lines.append(node.lineno)
    return lines


def test_no_module_is_named_after_nothing(modules: dict[Path, ast.Module]) -> None:
    names = {"utils", "util", "common", "helpers", "misc"}
    assert [path for path in modules if path.stem in names or path.parent.name in names] == []


def test_every_module_says_what_it_is(modules: dict[Path, ast.Module]) -> None:
    def is_empty_marker(path: Path) -> bool:
        return path.name == "__init__.py" and not modules[path].body

    silent = [path for path, module in modules.items() if not ast.get_docstring(module)]
    assert [path for path in silent if not is_empty_marker(path)] == []


def test_the_environment_is_read_in_config_alone(root: Path, modules: dict[Path, ast.Module]) -> None:
    config = root / "server/weft_server/config.py"
    assert environment_reads(modules[config])
    sources = tuple(root / folder for folder in SOURCES)
    reads = {
        path: lines
        for path, module in modules.items()
        if path != config and any(path.is_relative_to(folder) for folder in sources)
        if (lines := environment_reads(module))
    }
    assert reads == {}


@pytest.mark.parametrize(
    "statement",
    [
        "x = os.environ['A']",
        "x = os.environ.get('A')",
        "x = os.getenv('A')",
        "x = 'A' in os.environ",
        "f(os.environ)",
        "from os import environ",
    ],
)
def test_a_read_of_the_environment_is_noticed(statement: str) -> None:
    assert environment_reads(ast.parse(statement)) == [1]


@pytest.mark.parametrize(
    "statement",
    [
        "os.environ['A'] = 'b'",
        "del os.environ['A']",
        "run(env={**os.environ, 'A': 'b'})",
        "run(env=dict(os.environ, A='b'))",
        "env = os.environ.copy()",
        "env = os.environ | {'A': 'b'}",
    ],
)
def test_writing_an_environment_is_no_read_of_it(statement: str) -> None:
    assert environment_reads(ast.parse(statement)) == []


def test_nothing_is_marked_unfinished(root: Path, texts: dict[Path, str]) -> None:
    assert lines_matching(UNFINISHED, texts, root) == []


def test_no_path_of_one_machine_is_written_down(root: Path, texts: dict[Path, str]) -> None:
    assert lines_matching(MACHINE_PATH, texts, root) == []


def test_the_license_is_the_one_the_package_names(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    text = (root / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0" in text
