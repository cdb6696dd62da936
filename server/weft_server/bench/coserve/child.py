"""A contender's process: reads commands from standard input, a JSON object a line, and answers each with one.

    {"start": ROLE, "setup": …, "threads": N, "nice": N, "turns": FD or null}
    {"run": WINDOW} · {"answer_alone": WORKLOAD} · {"check": WORKLOAD, "shift": N} · {"end": true}

OpenMP reads its environment when torch is loaded, so wait policy and thread counts are set by the parent, and
torch is imported here and not in the parent. What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Protocol

from weft_server.bench.coserve.checks import Check
from weft_server.bench.coserve.window import Outcome, Window
from weft_server.bench.coserve.workload import BenchRequest, WorkloadSpec, make_requests

ROLES = ("weft", "generator", "trainer")


class Contender(Protocol):
    """What every role can be told; a role that cannot do something raises."""

    def run(self, window: Window) -> Outcome:
        """Run one window."""
        ...

    def answer_alone(self, requests: list[BenchRequest]) -> list[list[float]]:
        """Answer requests one after the other, with nothing else running."""
        ...

    def check(self, requests: list[BenchRequest]) -> Check:
        """Compute what contenders are compared by."""
        ...

    def close(self) -> None:
        """End what was begun."""
        ...


def main() -> int:
    """Obey until `end` or the end of the input; returns the exit status."""
    # Ctrl-C reaches the whole group, and the parent says what there is to say.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    contender: Contender | None = None
    for line in sys.stdin:
        command = json.loads(line)
        if "start" in command:
            contender = start(command)
            answer: Any = {}
        elif "end" in command or contender is None:
            break
        else:
            answer = obey(contender, command)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    if contender is not None:
        contender.close()
    return 0


def start(command: Mapping[str, Any]) -> Contender:
    """Build the contender of a role."""
    import torch

    from weft_server.bench.coserve.setup import Setup

    if command["nice"]:
        os.nice(command["nice"])
    torch.set_num_threads(command["threads"])
    setup, turns = Setup(**command["setup"]), command["turns"]
    if command["start"] == "weft":
        from weft_server.bench.coserve.weft_contender import WeftContender

        return WeftContender(setup)
    if command["start"] == "generator":
        from weft_server.bench.coserve.peer_generator import PeerGenerator
        from weft_server.bench.coserve.turns import GeneratorSide

        return PeerGenerator(setup, None if turns is None else GeneratorSide(turns))
    from weft_server.bench.coserve.peer_trainer import PeerTrainer

    return PeerTrainer(setup, turns)


def obey(contender: Contender, command: Mapping[str, Any]) -> Any:
    """Carry out one command; returns the answer as JSON-able values."""
    if "run" in command:
        return asdict(contender.run(Window.from_json(command["run"])))
    if "answer_alone" in command:
        return contender.answer_alone(list(make_requests(WorkloadSpec(**command["answer_alone"]))))
    requests = make_requests(WorkloadSpec(**command["check"]))
    shift, num_adapters = command["shift"], command["check"]["num_adapters"]
    moved = [replace(one, adapter_idx=(one.adapter_idx + shift) % num_adapters) for one in requests]
    return asdict(contender.check(moved))


if __name__ == "__main__":
    sys.exit(main())
