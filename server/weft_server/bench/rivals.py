"""Rivals in one run: each with its best number of threads, in turns, compared within a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from weft_server.bench.report import Report
from weft_server.bench.settings import Setting
from weft_server.bench.stats import Timings, interleave, sweep_threads, thread_candidates
from weft_server.bench.surroundings import num_cores

Measured = Callable[[], float]
"""Does its work once and returns the seconds that count."""


class Threads:
    """Every rival's best number of threads, swept before it is measured. On a GPU there is nothing to sweep.

    The threads of a product are a setting of the process: whoever computes sets them first (`use`).
    """

    def __init__(self, report: Report, setting: Setting) -> None:
        self._best: dict[str, int] = {}
        self._candidates = [] if setting.on_gpu else thread_candidates(num_cores())
        self._table = None
        if self._candidates:
            self._table = report.table(
                "Threads of each rival",
                ("rival", *(f"{number} threads, s" for number in self._candidates), "best"),
                "Seconds a token, or an iteration. OpenMP's default wait policy: nothing else runs.",
            )

    def sweep(self, rival: str, call: Measured) -> None:
        """Find the rival's best number of threads."""
        if self._table is None:
            return
        seconds = sweep_threads(call, self._candidates)
        self._best[rival] = torch.get_num_threads()
        self._table.add(rival, *(seconds[number] for number in self._candidates), self._best[rival])

    def under(self, rival: str, call: Measured) -> Measured:
        """The call with the rival's best number of threads (all cores for one that was not swept)."""

        def run() -> float:
            if self._candidates:
                torch.set_num_threads(self._best.get(rival, max(self._candidates)))
            return call()

        return run


def race(
    setting: Setting, threads: Threads, rivals: Mapping[str, Measured], *, work: str, min_rounds: int = 3
) -> Timings:
    """Sweep every rival's threads for this work, then measure in turns; seconds by rival and round."""
    for name, call in rivals.items():
        threads.sweep(f"{name}, {work}", call)
    calls = {name: threads.under(f"{name}, {work}", call) for name, call in rivals.items()}
    return take_turns(setting, calls, min_rounds=min_rounds)


def take_turns(setting: Setting, calls: Mapping[str, Measured], *, min_rounds: int = 3) -> Timings:
    """Measure in turns, each call once before; seconds by name and round. Two calls share `budget_s`."""
    return interleave(
        calls,
        lambda call: call(),
        budget_s=setting.budget_s * len(calls) / 2,
        min_rounds=min_rounds,
        warm_ups=1,
    )
