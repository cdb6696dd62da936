"""What a contender's process is told about the processor, and which tunings are tried."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from weft_server.bench.coserve.process import ContenderError, ContenderProcess, Tuning
from weft_server.bench.coserve.setup import Setup
from weft_server.bench.coserve.tuning import pair_candidates, single_candidates, sweep, turn_candidates


def test_a_process_gets_its_tuning_and_nothing_of_its_parents(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = tmp_path / "environment.json"
    popen = subprocess.Popen

    def spy(_command: list[str], **options: object) -> subprocess.Popen[str]:
        seen.write_text(json.dumps(options["env"]))
        return popen([sys.executable, "-c", ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(subprocess, "Popen", spy)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    for tuning, spins in ((Tuning(2), None), (Tuning(2, spins=1000), "1000")):
        with pytest.raises(ContenderError), ContenderProcess("weft", Setup("tiny", {}), tuning):
            pass
        environment = json.loads(seen.read_text())
        assert (environment["OMP_NUM_THREADS"], environment["OMP_WAIT_POLICY"]) == ("2", "PASSIVE")
        assert environment.get("GOMP_SPINCOUNT") == spins
        assert environment["PATH"] == os.environ["PATH"]


def test_tunings_say_what_they_are() -> None:
    assert str(Tuning(1)) == "1 thread, PASSIVE"
    assert str(Tuning(2, nice=19, spins=1000)) == "2 threads, PASSIVE after 1000 spins, nice 19"


@pytest.mark.parametrize("num_cores", [1, 2, 8])
def test_every_wait_policy_is_tried_for_everyone(num_cores: int) -> None:
    policies = {("PASSIVE", None), ("PASSIVE", 1000), ("ACTIVE", None)}
    singles = single_candidates(num_cores, is_quick=False)
    assert {(one.wait_policy, one.spins) for one in singles} == policies
    for candidates in (pair_candidates, turn_candidates):
        found = candidates(num_cores, is_quick=False)
        assert {(one.wait_policy, one.spins) for pair in found for one in pair} == policies
        assert all(1 <= one.threads <= num_cores for pair in found for one in pair)


def test_the_best_trial_is_taken() -> None:
    scores = {"a": (1.0, "slow"), "b": (3.0, "fast"), "c": (2.0, "")}
    found = sweep("contender", list(scores), scores.__getitem__)
    assert found.best == "b"
    assert [trial.note for trial in found.trials] == ["slow", "fast", ""]
