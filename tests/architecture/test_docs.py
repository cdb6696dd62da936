"""`docs/api.md` names what the source has: options, routes, fields, error codes, metrics."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from weft_server import errors
from weft_server.api.app import ROUTERS
from weft_server.api.schemas_generation import (
    CHAT_NEUTRAL,
    COMPLETION_NEUTRAL,
    ChatRequest,
    CompletionRequest,
)
from weft_server.api.schemas_jobs import CreateJobRequest, LoraOptions, SupervisedHyperparameters, WeftOptions
from weft_server.config import OPTIONS, Option
from weft_server.metrics import Metrics
from weft_server.protocol import Heartbeat

SNAKE_CASE = re.compile(r"[a-z]+(_[a-z]+)+")
# Printed by a program that ends, with its exit code; no response or job carries them.
START_UP_CODES = {"bad_configuration", "bad_model", "cannot_serve", "engine_start_failed", "bench_failed"}
# Calls whose arguments hold a code by position.
TAKES_CODE = {"JobError", "JobFailed", "RequestFailed", "CheckFailed", "_fail", "_refused"}


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    """The reference."""
    return (root / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def modules(root: Path) -> dict[Path, ast.Module]:
    """The server's modules, parsed (not imported: some need torch)."""
    folder = root / "server" / "weft_server"
    return {
        path.relative_to(folder): ast.parse(path.read_text(encoding="utf-8"))
        for path in folder.rglob("*.py")
        if path.relative_to(folder).parts[0] != "demo"
    }


def table_rows(page: str, num_columns: int) -> list[list[str]]:
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if "|" in line
    ]
    return [row for row in rows if len(row) == num_columns]


def written_default(option: Option) -> str | None:
    """As the page writes it; None where it is decided at start, which the page says in words."""
    if option.default is None:
        return None
    if isinstance(option.default, bool):
        return f"`{str(option.default).lower()}`"
    return f"`{option.default:g}`" if isinstance(option.default, float) else f"`{option.default}`"


def test_every_option_is_documented_with_its_names_and_default(page: str) -> None:
    rows = {row[0]: row for row in table_rows(page, 5)}
    for option in OPTIONS:
        row = rows.get(f"`{option.flag}`")
        assert row is not None, f"{option.flag} has no row"
        assert row[1:3] == [f"`{option.env}`", f"`{option.name}`"]
        default = written_default(option)
        if default is None:
            assert row[3][:1] not in ("", "`"), f"{option.flag} has no fixed default, {row[3]}"
        else:
            assert row[3] == default, option.flag


def test_every_documented_option_exists(page: str) -> None:
    known = {f"`{option.flag}`" for option in OPTIONS}
    documented = {row[0] for row in table_rows(page, 5) if row[0].startswith("`--")}
    assert documented <= known


def test_the_routes_documented_are_those_of_the_app(page: str) -> None:
    routes = {
        f"{method} {route.path.replace(':path}', '}')}"  # type: ignore[attr-defined]
        for router in ROUTERS
        for route in router.routes
        for method in route.methods  # type: ignore[attr-defined]
    }
    documented = {
        match[1] for match in re.finditer(r"^\| `((?:GET|POST|DELETE|PUT|PATCH) /\S+)` \|", page, re.M)
    }
    assert documented == routes


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([*CompletionRequest.model_fields, *COMPLETION_NEUTRAL], id="completions"),
        pytest.param([*ChatRequest.model_fields, *CHAT_NEUTRAL], id="chat"),
        pytest.param([*CreateJobRequest.model_fields, *SupervisedHyperparameters.model_fields], id="jobs"),
        pytest.param([name for name in WeftOptions.model_fields if name != "lora"], id="weft"),
        pytest.param([f"lora.{name}" for name in LoraOptions.model_fields], id="lora"),
    ],
)
def test_every_field_is_documented(page: str, names: list[str]) -> None:
    assert [name for name in names if f"`{name}`" not in page] == []


def test_every_error_code_is_documented(page: str, modules: dict[Path, ast.Module]) -> None:
    codes = default_codes(modules) - START_UP_CODES
    for module in modules.values():
        codes |= set(codes_given(module))
    assert len(codes) > 30
    assert sorted(code for code in codes if f"`{code}`" not in page) == []


def default_codes(modules: dict[Path, ast.Module]) -> set[str]:
    """Codes of the error classes that are raised somewhere without another code."""
    defaults = {
        node.name: value
        for module in modules.values()
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        for value in default_code(statement)
    }
    raised = {
        call.func.id
        for module in modules.values()
        for call in ast.walk(module)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and all(keyword.arg != "code" for keyword in call.keywords)
    }
    assert defaults["NotFound"] == errors.NotFound.default_code
    return {code for name, code in defaults.items() if name in raised}


def default_code(statement: ast.stmt) -> Iterator[str]:
    match statement:
        case ast.Assign(targets=[ast.Name(id="default_code")], value=ast.Constant(value=str(code))):
            yield code


def codes_given(module: ast.Module) -> Iterator[str]:
    """Codes written as `code=…`, assigned to a variable `code`, or passed to one of `TAKES_CODE`."""
    for node in ast.walk(module):
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=args) if name in TAKES_CODE:
                yield from snake_case_in(*args)
            case ast.keyword(arg="code", value=value):
                yield from snake_case_in(value)
            case ast.Assign(targets=[ast.Name(id="code")], value=value):
                yield from snake_case_in(value)
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                for target, value in zip(targets, values, strict=True):
                    if isinstance(target, ast.Name) and target.id == "code":
                        yield from snake_case_in(value)


def snake_case_in(*values: ast.expr | None) -> Iterator[str]:
    """Constants, and those of a conditional expression; not fallbacks (`error.code or "…"`)."""
    for value in values:
        match value:
            case ast.Constant(value=str(text)) if SNAKE_CASE.fullmatch(text):
                yield text
            case ast.IfExp(body=body, orelse=orelse):
                yield from snake_case_in(body, orelse)


def test_the_metrics_documented_are_those_exposed(page: str, modules: dict[Path, ast.Module]) -> None:
    gauges, counters = engine_metrics(modules[Path("engine/engine.py")], modules[Path("engine/paging.py")])
    metrics = Metrics("base")
    metrics.observe_heartbeat(Heartbeat(0, dict.fromkeys(gauges, 0.0), dict.fromkeys(counters, 0.0)))
    exposed = re.findall(r"^# TYPE (\w+) (\w+)$", metrics.render().decode(), re.M)
    documented = re.findall(r"^\| `(weft_\w+)` \| (\w+) \|", page, re.M)
    assert sorted(documented) == sorted(pair for pair in exposed if not pair[0].endswith("_created"))


def engine_metrics(engine: ast.Module, paging: ast.Module) -> tuple[set[str], set[str]]:
    """Names of the gauges and counters that `Engine.heartbeat` reports, those of its pager included."""
    heartbeat = next(n for n in ast.walk(engine) if isinstance(n, ast.FunctionDef) and n.name == "heartbeat")
    gauges: set[str] = set()
    counters: set[str] = set()
    for node in [*heartbeat.body, *engine.body, *paging.body]:
        match node:
            case ast.Assign(targets=[ast.Name(id="gauges")], value=value):
                gauges |= set(strings_in(value))
            case ast.Assign(targets=[ast.Name(id="counters" | "_COUNTERS")], value=value):
                counters |= set(strings_in(value))
    assert gauges
    assert counters
    return gauges, counters


def strings_in(value: ast.expr) -> Iterator[str]:
    for node in ast.walk(value):
        match node:
            case ast.Constant(value=str(text)):
                yield text
