"""The command line in a process of its own: help, exit codes, keys."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from weft_server import __version__, cli
from weft_server.errors import ConfigError, Unavailable
from weft_server.log import OneLineFormatter, configure_logging, current_request_id
from weft_server.service.tenants import TenantRegistry


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weft_server.cli", *arguments],
        capture_output=True,
        text=True,
        env=env,
        timeout=60,
        check=False,
    )


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"weft {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["serve", "x", "--prot", "1"], ["serve", "x", "--max-num", "1"], ["keys"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: weft" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "x", "--prot", "1"], "weft serve: error: unknown option '--prot'. Did you mean --port?"),
        (["serve", "--max-num-seq=1", "x"], "unknown option '--max-num-seq'. Did you mean --max-num-seqs?"),
        (["demo", "--zzz"], "weft demo: error: unknown option '--zzz'. Allowed: --help, --exit, --config,"),
        (["keys", "new", "--tenat", "x"], "weft keys new: error: unknown option '--tenat'. Did you mean"),
        (["serve", "x", "y"], "weft serve: error: unexpected argument 'y'"),
    ],
)
def test_an_unknown_argument_is_answered_with_what_is_allowed(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_bad_configuration_exits_with_2_and_one_line() -> None:
    done = run("serve", "x", "--port", "http")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "weft: --port: 'http' is not allowed. Allowed: 0 to 65535.\n"
    done = run("serve", "x", WEFT_PROT="1")
    assert done.returncode == 2
    assert "WEFT_PROT" in done.stderr


def test_help_shows_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    from weft_server.config import OPTIONS

    for option in OPTIONS:
        assert option.flag in text
    assert "127.0.0.1" in text


def test_help_loads_neither_torch_nor_fastapi() -> None:
    code = (
        "import sys, weft_server.cli as cli\n"
        "try: cli.main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'fastapi', 'tokenizers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("bad"), 2), (Unavailable("taken"), 1), (KeyboardInterrupt(), 130)]
)
def test_failures_have_their_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_arguments: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_new_key", fail)
    assert cli.main(["keys", "new"]) == code
    if code != 130:
        assert capsys.readouterr().err.startswith("weft: ")


def test_a_new_key_works_with_the_lines_printed_beside_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["keys", "new", "--tenant", "acme", "--admin"]) == 0
    first, _, lines = capsys.readouterr().out.partition("\n")
    lines = lines[lines.index("[[tenants]]") :]
    assert tomllib.loads(lines)["tenants"][0]["name"] == "acme"
    (tmp_path / "keys.toml").write_text(lines)
    secret = first.rsplit(" ", 1)[1]
    tenant = TenantRegistry(tmp_path / "keys.toml").authenticate(f"Bearer {secret}")
    assert (tenant.name, tenant.is_admin) == ("acme", True)
    assert secret not in lines


def test_a_bad_tenant_name_is_refused() -> None:
    assert cli.main(["keys", "new", "--tenant", 'a"b']) == 2


def test_a_log_record_is_one_line_with_the_request_id() -> None:
    stream = io.StringIO()
    logger = logging.getLogger("weft_server.test")
    parent = logging.getLogger("weft_server")
    before = (parent.handlers, parent.propagate, parent.level)
    try:
        configure_logging("info", stream)
        token = current_request_id.set("req_1")
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logger.exception("it failed\nbadly")
        finally:
            current_request_id.reset(token)
        logger.debug("hidden")
    finally:
        parent.handlers, parent.propagate, parent.level = before
    (line,) = stream.getvalue().splitlines()
    assert "ERROR weft_server.test it failed | badly request_id=req_1" in line
    assert "ValueError: two | lines" in line
    assert isinstance(OneLineFormatter(), logging.Formatter)
