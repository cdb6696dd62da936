"""Which measured times are outliers: those that other iterations of their kind do not share.

A time that is far from its prediction says either that the machine stumbled or that the prediction is wrong.
The next iterations of the same kind tell: if most of them miss by as much, it is the prediction, and the
times are to be learnt from in full, however rare the kind is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from statistics import median

_RECENT_OF_A_KIND = 9
_RECENT = 32
_LEAST_REACH = 1.5


class OutlierGuard:
    """Clips times against the recent ones of their kind."""

    def __init__(self) -> None:
        """Nothing has been seen: the predictions are trusted."""
        self._ratios: dict[Hashable, deque[float]] = {}
        self._misses: deque[float] = deque(maxlen=_RECENT)

    def clip(self, kind: Hashable, predicted_s: float, elapsed_s: float) -> float:
        """The time to learn from: `elapsed_s`, unless it is beyond the reach of what is usual for its kind.

        Usual is the prediction times the median ratio of the latest of the kind, this one among them; until
        three have been seen, the prediction. The reach is a factor of 1.5, more while predictions in general
        are far off.
        """
        reach = max(_LEAST_REACH, 2.0 * median(self._misses) - 1.0) if self._misses else _LEAST_REACH
        self._misses.append(max(predicted_s / elapsed_s, elapsed_s / predicted_s))
        ratios = self._ratios.setdefault(kind, deque([1.0, 1.0], maxlen=_RECENT_OF_A_KIND))
        ratios.append(elapsed_s / predicted_s)
        usual_s = predicted_s * median(ratios)
        return min(max(elapsed_s, usual_s / reach), usual_s * reach)

    def clear(self) -> None:
        """Forget what was seen."""
        self._ratios.clear()
        self._misses.clear()
