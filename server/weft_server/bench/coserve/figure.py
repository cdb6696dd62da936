"""The curves as a figure: finetuning kept and attainment over load, a column for each objective.

Matplotlib comes with the extra `plots`; without it no figure is drawn.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from weft_server.bench.coserve.measures import ATTAINMENT
from weft_server.bench.coserve.results import Results

_COLOURS = {
    "Weft": "#0072B2",
    "alternating": "#E69F00",
    "two processes": "#009E73",
    "taking turns": "#CC79A7",
}
_DPI = 110


def draw(results: Results, path: Path) -> None:
    """Write the figure; says so on standard error where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no figure: matplotlib is not installed", file=sys.stderr)
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(results.slos), 7.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(results.slos), sharex=True, sharey="row", squeeze=False)
    for column, slo in enumerate(results.slos):
        upper, lower = axes[0][column], axes[1][column]
        for contender, colour in _COLOURS.items():
            found = [results.find(contender, load, slo) for load in results.loads]
            points = [point for point in found if point is not None]
            loads = [point.requests_per_s for point in points]
            style = {"color": colour, "marker": "o", "label": contender}
            if points:
                upper.plot(loads, [point.trained_per_s for point in points], **style)
                lower.plot(loads, [100 * (point.attained(slo) or 0.0) for point in points], **style)
        peak = results.peak_per_s("Weft")
        if peak is not None:
            upper.axhline(peak, color="#9A9A9A", linestyle="--", label="Weft, dedicated")
        lower.axhline(100 * ATTAINMENT, color="#9A9A9A", linestyle="--")
        upper.set_title(f"{slo.name}: {1000 * slo.tpot_s:.0f} ms per token")
        lower.set_xlabel("requests a second")
        _finish(upper, lower)
    axes[0][0].set_ylabel("finetuned tokens/s")
    axes[1][0].set_ylabel("requests within the objective, %")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"Co-serving {results.shape_name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    print(f"written {path}")


def _finish(*panels: Any) -> None:
    for panel in panels:
        panel.set_ylim(bottom=0.0)
        panel.grid(alpha=0.3)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
