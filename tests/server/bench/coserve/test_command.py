"""The command as a user runs it, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from weft_server.bench.coserve.options import SloSpec
from weft_server.bench.coserve.process import ContenderError, ContenderProcess, Tuning
from weft_server.errors import ConfigError


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weft_server.bench", "coserve", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)


def test_it_measures_weft_and_writes_a_report(tmp_path: Path) -> None:
    flags = ["--model", "tiny", "--quick", "--no-peers", "--seconds", "0.5", "--length-scale", "0.04"]
    done = run(*flags, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "coserve-tiny-cpu.json").read_text())
    contenders = {row["contender"] for row in report["data"]["points"]}
    assert {"inference alone", "finetuning alone", "Weft", "alternating"} <= contenders
    assert all(row["trained_per_s"] > 0 for row in report["data"]["points"] if row["contender"] == "Weft")
    assert "not measured" in (tmp_path / "coserve-tiny-cpu.md").read_text()


@pytest.mark.slow
def test_it_checks_and_measures_the_peers(tmp_path: Path) -> None:
    flags = ["--model", "tiny", "--quick", "--seconds", "1", "--length-scale", "0.04"]
    done = run(*flags, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "coserve-tiny-cpu.json").read_text())
    assert len(report["checks"]) == 3
    assert all(check["passed"] for check in report["checks"])
    contenders = {row["contender"] for row in report["data"]["points"]}
    assert {"two processes", "taking turns", "PEFT training alone"} <= contenders


def test_a_load_or_objective_that_is_no_number_is_refused() -> None:
    assert SloSpec.parse("1.5x").resolve(0.02, 1.0).tpot_s == pytest.approx(0.03)
    assert SloSpec.parse("50").resolve(0.02, 1.0).tpot_s == pytest.approx(0.05)
    for text in ("", "x", "0x", "fast", "-1"):
        with pytest.raises(ConfigError, match="--slo"):
            SloSpec.parse(text)


def test_a_contender_that_cannot_start_is_an_error(setup) -> None:
    broken = type(setup)("broken", {**setup.hf_config, "model_type": "gpt2"})
    with (
        pytest.raises(ContenderError, match="weft process has ended"),
        ContenderProcess("weft", broken, Tuning(1)),
    ):
        pass
