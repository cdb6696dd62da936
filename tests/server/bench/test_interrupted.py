"""A benchmark that is ended in the middle says so by its exit code, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

SERVE = ("serve", "--model", "demo", "--rate", "2", "--length-scale", "0.1", "--duration", "60")
COSERVE = ("coserve", "--model", "tiny", "--quick", "--no-peers", "--seconds", "30", "--device", "cpu")
ADAPTERS = ("adapters", "--model", "tiny", "--budget-s", "60", "--device", "cpu")


class Running:
    """A benchmark in a process group of its own, as a terminal starts it."""

    def __init__(self, part: tuple[str, ...], output: Path) -> None:
        with output.open("wb") as written:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "weft_server.bench", *part, "--no-out"],
                stdout=written,
                stderr=written,
                start_new_session=True,
            )
        self.output = output

    def children(self) -> list[psutil.Process]:
        """What it has started so far."""
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture(params=[SERVE, COSERVE, ADAPTERS], ids=["serve", "coserve", "adapters"])
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Running]:
    bench = Running(request.param, tmp_path / "output")
    yield bench
    if bench.process.poll() is None:
        os.killpg(bench.process.pid, signal.SIGKILL)
        bench.process.wait()


def wait_for_child(bench: Running) -> list[psutil.Process]:
    while not (children := bench.children()):
        assert bench.process.poll() is None, bench.output.read_text()
        psutil.wait_procs([psutil.Process(bench.process.pid)], timeout=0.05)
    return children


def test_ctrl_c_ends_it_without_a_traceback(running: Running) -> None:
    children = wait_for_child(running)
    os.killpg(running.process.pid, signal.SIGINT)
    assert running.process.wait(timeout=60) == 130
    _, left = psutil.wait_procs(children, timeout=30)
    assert left == []
    assert "Traceback" not in running.output.read_text()


def test_a_terminated_one_ends_what_it_has_started(running: Running) -> None:
    children = wait_for_child(running)
    os.kill(running.process.pid, signal.SIGTERM)
    assert running.process.wait(timeout=60) == 128 + signal.SIGTERM
    _, left = psutil.wait_procs(children, timeout=30)
    assert left == []
