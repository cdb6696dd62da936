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

SERVE = "serve --model demo --rate 2 --length-scale 0.1 --duration 60"
COSERVE = "coserve --model tiny --quick --no-peers --seconds 30 --device cpu"


class Running:
    """A benchmark in a process group of its own, as a shell starts it."""

    def __init__(self, part: str, output: Path) -> None:
        self._output = output
        with output.open("wb") as written:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "weft_server.bench", *part.split(), "--no-out"],
                stdout=written,
                stderr=written,
                start_new_session=True,
            )

    def output(self) -> str:
        return self._output.read_text()

    def children_once_it_says(self, text: str) -> list[psutil.Process]:
        """The processes that it has started when this is in its output."""
        process = psutil.Process(self.process.pid)
        while text not in self.output():
            assert self.process.poll() is None, self.output()
            psutil.wait_procs([process], timeout=0.05)
        return process.children(recursive=True)


@pytest.fixture(
    params=[(SERVE, "finetuning yields to"), (COSERVE, "inference alone")], ids=["serve", "coserve"]
)
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Running, list[psutil.Process]]]:
    part, text = request.param
    bench = Running(part, tmp_path / "output")
    yield bench, bench.children_once_it_says(text)
    if bench.process.poll() is None:
        os.killpg(bench.process.pid, signal.SIGKILL)
        bench.process.wait()


def test_ctrl_c_ends_it_without_a_traceback(running: tuple[Running, list[psutil.Process]]) -> None:
    bench, children = running
    assert children
    os.killpg(bench.process.pid, signal.SIGINT)
    # A shell says 130 of both.
    assert bench.process.wait(timeout=60) in (130, -signal.SIGINT), bench.output()
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert "Traceback" not in bench.output()


def test_a_terminated_one_ends_what_it_has_started(running: tuple[Running, list[psutil.Process]]) -> None:
    bench, children = running
    assert children
    os.kill(bench.process.pid, signal.SIGTERM)
    assert bench.process.wait(timeout=60) == 128 + signal.SIGTERM, bench.output()
    assert psutil.wait_procs(children, timeout=30)[1] == []
