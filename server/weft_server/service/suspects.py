"""Who may have killed the engine: a few short trials tell the one that did from those that were beside it.

All that was in the plan of a death is suspected. Suspects return to the next engine a group at a time, while
the others wait; whoever was not in the plan goes on as if nothing had happened. A suspect that gets beyond
the point at which the engine died, or ends, is cleared. One that dies alone among the suspects on trial is
guilty. Up to `SMALL` suspects are tried one by one, so that the guilty one fails at its second death; more in
groups of about their number's square root, so that it fails at its third and the last innocent does not wait
for all the others.

Pure: values in, values out. Time comes in as `now`, seconds of any clock. Knows nothing of requests, jobs or
processes but their ids.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

SMALL = 8
PATIENCE_S = 30.0
"""How long a group on trial may show no sign of life (it waits for the store, or for its turn) before the
next one joins it."""


class Suspects:
    """The suspects of one server, over all its engines."""

    def __init__(self) -> None:
        self._goals: dict[str, int] = {}
        self._waiting: deque[list[str]] = deque()
        self._on_trial: list[str] = []
        self._last_sign_s = 0.0

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._goals

    def must_wait(self, item_id: str) -> bool:
        """Whether it is suspected and its trial has not begun: it must not be given to the engine."""
        return item_id in self._goals and item_id not in self._on_trial

    def engine_died(self, goals: Mapping[str, int]) -> str | None:
        """Take notice of a death.

        Args:
            goals: what was in the fatal plan, in the order in which it is to be tried. Each with the position
                (in tokens, steps, …: whatever `progressed` is told) that will clear it.

        Returns:
            The guilty one, which is suspected no longer and must not be run again; None if that is not known
            yet. All other suspects wait again for `admit`.
        """
        accused = [item_id for item_id in self._on_trial if item_id in goals]
        not_involved = [item_id for item_id in self._on_trial if item_id not in goals]
        self._on_trial = []
        if not_involved:
            self._waiting.appendleft(not_involved)
        if len(accused) == 1:
            del self._goals[accused[0]]
            return accused[0]
        if accused:
            # The guilty one is among these, so what ran beside them unsuspected stays so.
            self._goals.update((item_id, goals[item_id]) for item_id in accused)
            self._waiting.extendleft([item_id] for item_id in reversed(accused))
        else:
            suspected = {item_id: goal for item_id, goal in goals.items() if item_id not in self._goals}
            self._goals |= suspected
            self._waiting.extend(_groups(list(suspected)))
        return None

    def admit(self, now: float) -> list[str]:
        """Those whose trial begins now, if it is time for the next: they are to be given to the engine."""
        if self._on_trial and now - self._last_sign_s < PATIENCE_S:
            return []
        if not self._waiting:
            return []
        group = self._waiting.popleft()
        self._on_trial += group
        self._last_sign_s = now
        return group

    def progressed(self, item_id: str, position: int, now: float) -> None:
        """A suspect or anything else has come so far; at its goal a suspect is cleared."""
        if item_id not in self._on_trial:
            return
        self._last_sign_s = now
        if position >= self._goals[item_id]:
            self.forget(item_id)

    def forget(self, item_id: str) -> None:
        """It was cleared, or it ended or was given up: nobody waits for it."""
        if self._goals.pop(item_id, None) is None:
            return
        if item_id in self._on_trial:
            self._on_trial.remove(item_id)
            return
        for group in self._waiting:
            if item_id in group:
                group.remove(item_id)
        self._waiting = deque(group for group in self._waiting if group)


def _groups(item_ids: list[str]) -> list[list[str]]:
    size = 1 if len(item_ids) <= SMALL else math.ceil(math.sqrt(len(item_ids)))
    return [item_ids[start : start + size] for start in range(0, len(item_ids), size)]
