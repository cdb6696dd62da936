"""How fast the machine runs right now, against how fast it usually does.

What else runs on a machine, its clock and its temperature change the time of every iteration alike, within a
few iterations: sooner than a fit over hundreds of them can follow. The pace is one factor on all times that
does. It leaves lasting changes to the fit: with every iteration it returns a little to one.
"""

from __future__ import annotations

from collections import deque
from math import exp, log
from statistics import median

_STEP = 0.2
_MOST_STEP = 0.15
_JUMP = 0.2
_NUM_SLOWER = 3
_NUM_FASTER = 2
_RETURN = 0.95
_MOST = log(16.0)


class Pace:
    """A factor that follows the ratio of measured to usual times.

    It takes small steps after every iteration, so that the noise of single ones averages out. If the last
    three were all more than 0.2 (of the logarithm) above it, it jumps to their median, and downwards after
    two: a lone stumble does not move it, and the end of a slow spell is noticed at once. Iterations of a kind
    that is predicted wrongly cannot make it jump unless the others agree with them.
    """

    def __init__(self) -> None:
        """Start at the usual pace."""
        self._log_factor = 0.0
        self._latest: deque[float] = deque(maxlen=_NUM_SLOWER)

    @property
    def factor(self) -> float:
        """What usual times are multiplied by; more than one on a machine slower than usual."""
        return exp(self._log_factor)

    def observe(self, ratio: float) -> None:
        """An iteration took `ratio` times its usual time (positive)."""
        self._latest.append(min(max(log(ratio), -_MOST), _MOST))
        latest, before = list(self._latest), self._log_factor
        slower, faster = latest[-_NUM_SLOWER:], latest[-_NUM_FASTER:]
        if len(slower) == _NUM_SLOWER and min(slower) > before + _JUMP:
            moved = median(slower)
        elif len(faster) == _NUM_FASTER and max(faster) < before - _JUMP:
            moved = median(faster)
        else:
            moved = before + _STEP * min(max(latest[-1] - before, -_MOST_STEP), _MOST_STEP)
        self._log_factor = _RETURN * moved

    def reset(self) -> None:
        """Back to the usual pace, forgetting what was seen."""
        self._log_factor = 0.0
        self._latest.clear()
