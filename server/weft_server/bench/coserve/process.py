"""A contender as its parent sees it: a process, and calls that go to it over a pipe."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from weft_server.bench.coserve.checks import Check
from weft_server.bench.coserve.setup import Setup
from weft_server.bench.coserve.window import Outcome, Window
from weft_server.bench.coserve.workload import WorkloadSpec


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a process uses the processor: OpenMP threads, what they do while they wait (with `spins`, that many
    rounds of spinning first), and its niceness.
    """

    threads: int
    wait_policy: str = "PASSIVE"
    nice: int = 0
    spins: int | None = None

    def __str__(self) -> str:
        """As tables print it."""
        spins = f" after {self.spins} spins" if self.spins is not None else ""
        nice = f", nice {self.nice}" if self.nice else ""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{threads}, {self.wait_policy}{spins}{nice}"

    @property
    def environment(self) -> dict[str, str]:
        """What OpenMP reads when it is loaded."""
        spins = {} if self.spins is None else {"GOMP_SPINCOUNT": str(self.spins)}
        return {"OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": self.wait_policy, **spins}


class ContenderError(RuntimeError):
    """A contender's process has ended; what it wrote to standard error says why."""


class ContenderProcess:
    """One running contender. A context manager: leaving it ends the process."""

    def __init__(self, role: str, setup: Setup, tuning: Tuning, turn_fileno: int | None = None) -> None:
        """Start it; entering the context waits until it is ready to run."""
        self._role = role
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
        environment.pop("GOMP_SPINCOUNT", None)
        environment |= tuning.environment
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore::FutureWarning", "-m", "weft_server.bench.coserve.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            pass_fds=() if turn_fileno is None else (turn_fileno,),
        )
        self._send({"start": role, "setup": asdict(setup), **_as_json(tuning), "turns": turn_fileno})

    def begin(self, window: Window) -> None:
        """Tell it to run a window; `outcome` waits for the end."""
        self._send({"run": asdict(window)})

    def outcome(self) -> Outcome:
        """What happened in the window that was begun."""
        return Outcome.from_json(self._receive())

    def run(self, window: Window) -> Outcome:
        """Run a window."""
        self.begin(window)
        return self.outcome()

    def answer_alone(self, workload: WorkloadSpec) -> list[list[float]]:
        """Times of each token of requests that are answered one after the other."""
        self._send({"answer_alone": asdict(workload)})
        times: list[list[float]] = self._receive()
        return times

    def check(self, workload: WorkloadSpec, *, adapter_shift: int = 0) -> Check:
        """What contenders are compared by; with a shift, under adapters other than the requests'."""
        self._send({"check": asdict(workload), "shift": adapter_shift})
        return Check.from_json(self._receive())

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            try:
                self._send({"end": True})
                self._process.wait(timeout=20)
            except (ContenderError, subprocess.TimeoutExpired):
                self._process.kill()
        self._process.wait()

    def __enter__(self) -> ContenderProcess:
        """Itself, once it is ready.

        Raises:
            ContenderError: it cannot be built.
        """
        try:
            self._receive()
        except BaseException:
            self._process.kill()
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process; in the midst of a window if that is where the benchmark ends."""
        if kind is not None:
            self._process.kill()
        self.close()

    def _send(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ContenderError(f"the {self._role} process has ended") from error

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ContenderError(f"the {self._role} process has ended (status {self._process.wait()})")
        return json.loads(line)


@contextmanager
def peer_pair(setup: Setup, tunings: Sequence[Tuning]) -> Iterator[tuple[ContenderProcess, ContenderProcess]]:
    """A generator and a trainer (with the tunings in that order) that can take turns."""
    ends = socket.socketpair()
    with ExitStack() as stack:
        for end in ends:
            stack.enter_context(end)
        # Both are started before either is waited for; whichever fails to, the other is ended.
        pair = [
            ContenderProcess(role, setup, tuning, end.fileno())
            for role, tuning, end in zip(("generator", "trainer"), tunings, ends, strict=True)
        ]
        for process in pair:
            stack.callback(process.close)
        generator, trainer = (stack.enter_context(process) for process in pair)
        yield generator, trainer


def _as_json(tuning: Tuning) -> dict[str, int]:
    return {"threads": tuning.threads, "nice": tuning.nice}
