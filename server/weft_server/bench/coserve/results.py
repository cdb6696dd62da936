"""Everything that a run has found, and the comparisons that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from weft_server.bench.coserve.measures import ATTAINMENT, Point, Slo
from weft_server.bench.coserve.process import Tuning
from weft_server.bench.coserve.tuning import Sweep

HALF_BUSY = 0.5
SAME_ATTAINMENT = 0.1
"""How much less of the requests a rival may attain and still be compared: two or three of a window's."""


@dataclass(slots=True)
class Results:
    """Filled while a run goes on; what depends on peers stays empty where there are none (`peers_absent`)."""

    shape_name: str
    peers_absent: str | None = None
    weft_tuning: Sweep[Tuning] = field(default_factory=lambda: Sweep("Weft", ()))
    peer_tunings: list[Sweep[Tuning]] = field(default_factory=list)
    pair_tunings: list[Sweep[tuple[Tuning, Tuning]]] = field(default_factory=list)
    unloaded_tpot_s: float = 0.0
    peer_unloaded_tpot_s: float = 0.0
    loads: tuple[float, ...] = ()
    slos: tuple[Slo, ...] = ()
    points: list[Point] = field(default_factory=list)

    def add(self, point: Point) -> None:
        """One window more."""
        self.points.append(point)

    def find(self, contender: str, load: float | None = None, slo: Slo | None = None) -> Point | None:
        """The window of a contender at a load; one that knows no objectives has a window for all of them."""
        for point in self.points:
            is_of_slo = point.slo is None or slo is None or point.slo == slo
            if point.contender == contender and is_of_slo and load in (None, point.requests_per_s):
                return point
        return None

    @property
    def half_busy_load(self) -> float:
        """The load at which inference alone is nearest to being busy half of the time."""
        alone = [point for point in self.points if point.contender == "inference alone"]
        return min(alone, key=lambda point: abs(point.busy_share - HALF_BUSY)).requests_per_s

    def busy_share(self, load: float) -> float:
        """The part of the time that inference alone is busy at a load."""
        point = self.find("inference alone", load)
        return 0.0 if point is None else point.busy_share

    def peak_per_s(self, contender: str) -> float | None:
        """Finetuned tokens a second of a contender that has the machine to itself."""
        is_peer = contender in ("two processes", "taking turns")
        point = self.find("PEFT training alone" if is_peer else "finetuning alone")
        return None if point is None else point.trained_per_s

    def kept(self, point: Point) -> float | None:
        """Finetuning relative to the contender's own dedicated peak."""
        peak = self.peak_per_s(point.contender)
        return point.trained_per_s / peak if peak else None

    def kept_of_light(self, point: Point) -> float | None:
        """Finetuning relative to the contender's own at the lightest load."""
        light = self.find(point.contender, self.loads[0], point.slo)
        return point.trained_per_s / light.trained_per_s if light and light.trained_per_s else None

    def gain(self, rival: str, load: float, slo: Slo) -> float | None:
        """Weft's finetuned tokens a second over a rival's; 0 where Weft attains less than the rival does and
        less than it should, None where the rival was not measured or attains too little to be compared.
        """
        own, other = self.find("Weft", load, slo), self.find(rival, load, slo)
        if own is None or other is None or not other.trained_per_s or self.is_outdone(rival, load, slo):
            return None
        needed = min(ATTAINMENT, other.attained(slo) or 0.0)
        if (own.attained(slo) or 0.0) < needed:
            return 0.0
        return own.trained_per_s / other.trained_per_s

    def is_outdone(self, rival: str, load: float, slo: Slo) -> bool:
        """Whether a rival attains less than it should, and more than `SAME_ATTAINMENT` less than Weft: then
        nothing was measured at the same attainment.
        """
        own, other = self.find("Weft", load, slo), self.find(rival, load, slo)
        if own is None or other is None:
            return False
        needed = min(ATTAINMENT, own.attained(slo) or 0.0)
        return (other.attained(slo) or 0.0) < needed - SAME_ATTAINMENT
