"""Latencies of every request over time, and their distribution. Matplotlib comes with the extra `plots`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from weft_server.bench.serve.load import Run
from weft_server.bench.serve.measures import Latencies

_COLOURS = ("#0072B2", "#E69F00", "#009E73")
_DPI = 110


class Drawn(Protocol):
    """A phase with its name and requests."""

    @property
    def name(self) -> str: ...
    @property
    def run(self) -> Run | None: ...


def draw(phases: Sequence[Drawn], path: Path) -> None:
    """Write the figure; says so on standard error where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no figure: matplotlib is not installed", file=sys.stderr)
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    for colour, phase in zip(_COLOURS, [one for one in phases if one.run is not None], strict=False):
        assert phase.run is not None
        found = [(sent.request.arrival_s, lat) for sent in phase.run.sent if (lat := Latencies.of(sent))]
        for row, name in enumerate(("ttft_ms", "tpot_ms")):
            values = [getattr(latencies, name) for _, latencies in found]
            axes[row][0].plot([time_s for time_s, _ in found], values, ".", color=colour, label=phase.name)
            shares = [100.0 * (idx + 1) / len(values) for idx in range(len(values))]
            axes[row][1].plot(sorted(values), shares, color=colour, label=phase.name)
    for row, label in enumerate(("ms to first token", "ms per token")):
        axes[row][0].set_ylabel(label)
        axes[row][0].set_ylim(bottom=0.0)
        axes[row][0].set_xlabel("seconds")
        axes[row][1].set_xlabel(label)
        axes[row][1].set_ylabel("% of requests")
        for panel in axes[row]:
            panel.grid(alpha=0.3)
            for side in ("top", "right"):
                panel.spines[side].set_visible(False)
    axes[0][0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    print(f"written {path}")
