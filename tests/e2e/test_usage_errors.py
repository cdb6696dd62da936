"""What stops `weft` before it serves: exit status and a message that names the value and the remedy."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def data_flag(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return ("--data-dir", str(tmp_path_factory.mktemp("data")))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--no-such-flag",), "--no-such-flag"),
        (("--port", "99999"), "--port: '99999' is not allowed"),
        (("--quantization", "int3"), "auto, nf4, int8 or none"),
        (("--host", "0.0.0.0"), "--no-auth"),
        (("--api-keys", "/nowhere.toml"), "/nowhere.toml"),
        (("--redis-volatile",), "--store"),
    ],
)
def test_a_bad_flag_is_a_usage_error(flags: tuple[str, ...], named: str, helpers: Any) -> None:
    ended = helpers.run_weft("serve", "demo", *flags)
    assert ended.returncode == 2
    assert named in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("env", "named"),
    [({"WEFT_PROT": "1"}, "WEFT_PROT"), ({"WEFT_PORT": "http"}, "WEFT_PORT: 'http' is not allowed")],
)
def test_a_bad_variable_is_a_usage_error(env: dict[str, str], named: str, helpers: Any) -> None:
    ended = helpers.run_weft("serve", "demo", env=env)
    assert (ended.returncode, named in ended.stderr) == (2, True)


@pytest.mark.parametrize("flag", ["--adapter-arena-mb", "--kv-cache-tokens"])
def test_a_size_that_this_machine_cannot_hold_is_a_usage_error(
    flag: str, data_flag: Any, plain_model: Any, helpers: Any
) -> None:
    ended = helpers.run_weft("serve", str(plain_model), "--port", "0", flag, "2000000000", *data_flag)
    assert ended.returncode == 2, ended.stderr
    assert f"{flag} is 2000000000" in ended.stderr
    assert re.search(r"Allowed: \d+ to \d+", ended.stderr)
    assert "Traceback" not in ended.stderr


def test_a_taken_port_is_a_failure_that_says_so(data_flag: Any, plain_model: Any, helpers: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = helpers.run_weft("serve", str(plain_model), "--port", port, *data_flag)
    assert ended.returncode == 1
    assert f"127.0.0.1:{port}" in ended.stderr
    assert "--port" in ended.stderr


@pytest.mark.parametrize(
    ("kind", "status", "named"),
    [
        ("missing", 2, "neither an existing directory nor a hub id"),
        ("file", 2, "neither an existing directory nor a hub id"),
        ("empty", 2, "holds no config.json, so it is not a Hugging Face model directory"),
        ("broken config", 1, "config.json cannot be read as JSON"),
        ("no weights", 1, "safetensors"),
    ],
)
def test_what_is_no_model_is_refused_with_its_path(
    kind: str, status: int, named: str, data_flag: Any, plain_model: Path, tmp_path: Path, helpers: Any
) -> None:
    model = tmp_path / "model"
    if kind == "file":
        model.write_text("weights?")
    elif kind != "missing":
        model.mkdir()
    if kind == "broken config":
        (model / "config.json").write_text("{")
    if kind == "no weights":
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((plain_model / name).read_bytes())
    ended = helpers.run_weft("serve", str(model), "--port", "0", *data_flag)
    assert ended.returncode == status, ended.stderr
    assert named in ended.stderr
    assert str(model) in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_engine_that_cannot_be_started_is_a_failure_that_says_so(
    tmp_path: Path, plain_model: Any, helpers: Any
) -> None:
    (tmp_path / "run").write_text("a file where a folder must be")
    result = helpers.run_weft("serve", str(plain_model), "--port", "0", "--data-dir", str(tmp_path))
    assert result.returncode == 1
    assert "weft: the engine process cannot be started:" in result.stderr
    assert str(tmp_path / "run") in result.stderr
