"""Figures of a simulation: what every iteration ran, and load, latency and finetuning over time.

Matplotlib is imported when something is drawn; it comes with the extra `plots`.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft_scheduler.simulator.report import Slo
from weft_scheduler.simulator.simulation import Result
from weft_scheduler.simulator.timeline import Iteration
from weft_server.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by the colour-blind; grey is for the rest.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
REST = "#9A9A9A"
INK = "#333333"
_DPI = 110
_LANES = (
    ("decode", "decode"),
    ("prefill", "prompts"),
    ("train", "finetuning\nforward"),
    ("backward", "finetuning\nbackward"),
)


def check_matplotlib() -> None:
    """Say how to get it, before a simulation runs for nothing.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--png needs matplotlib, which is not installed: pip install 'weft[plots]'")


def draw_all(result: Result, slo: Slo, folder: Path, *, title: str) -> list[Path]:
    """Write `timeline.png` and `curves.png` into a folder (made if needed); returns what was written.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        if result.timeline.iterations:
            written.append(
                save(draw_timeline(result.timeline.iterations, slo, title), folder / "timeline.png")
            )
        if result.samples:
            written.append(save(draw_curves(result, slo, title), folder / "curves.png"))
    except OSError as error:
        raise ConfigError(f"--png {folder}: cannot be written: {error.strerror or error}") from error
    return written


def new_figure(num_rows: int, heights: Sequence[float], *, width: float = 10.0) -> tuple[Figure, list[Axes]]:
    """A figure of panels above each other that share their x axis, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, 1, sharex=True, gridspec_kw={"height_ratios": heights}, squeeze=False)
    panels: list[Axes] = [row[0] for row in axes]
    for panel in panels:
        style(panel)
    return figure, panels


def style(panel: Axes) -> None:
    """Quiet axes: no box, faint lines across."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(colors=INK, labelsize=9)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG."""
    figure.savefig(path, dpi=_DPI)
    return path


def draw_timeline(iterations: Sequence[Iteration], slo: Slo, title: str) -> Figure:
    """A lane for each kind of work: bars as wide as their iteration, as high as its tokens, coloured by
    tenant; below, how long every iteration took and what it was to take.
    """
    figure, panels = new_figure(len(_LANES) + 1, [1.1] * len(_LANES) + [1.7])
    colors = tenant_colors(iterations)
    first_s = iterations[0].start_s
    for panel, (kind, label) in zip(panels, _LANES, strict=False):
        _draw_lane(panel, iterations, kind, colors)
        panel.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10, color=INK)
        panel.locator_params(axis="y", nbins=3)
    _draw_durations(panels[-1], iterations, slo)
    panels[-1].set_xlim(first_s, iterations[-1].end_s)
    panels[-1].set_xlabel("time, s", fontsize=10, color=INK)
    figure.suptitle(f"{title}: tokens of every iteration", fontsize=12, color=INK)
    figure.legend(
        handles=[_patch(color, name) for name, color in colors.items()],
        loc="outside lower center",
        ncols=min(8, len(colors)),
        fontsize=9,
        frameon=False,
    )
    return figure


def tenant_colors(iterations: Sequence[Iteration]) -> dict[str, str]:
    """Colours of the tenants with most work; all others are grey."""
    tokens: Counter[str] = Counter()
    for iteration in iterations:
        for part in iteration.parts:
            # Decodes are few tokens and most of what is waited for.
            tokens[part.tenant] += round(part.tokens * (20 if part.kind == "decode" else 1))
    names = [name for name, _ in tokens.most_common()]
    named = names if len(names) <= len(PALETTE) else names[: len(PALETTE) - 1]
    colors = dict(zip(sorted(named), PALETTE, strict=False))
    if len(names) > len(named):
        colors[f"{len(names) - len(named)} others"] = REST
    return colors


def _draw_lane(panel: Axes, iterations: Sequence[Iteration], kind: str, colors: Mapping[str, str]) -> None:
    names = list(colors)
    bottoms = [0.0] * len(iterations)
    starts = [iteration.start_s for iteration in iterations]
    widths = [iteration.end_s - iteration.start_s for iteration in iterations]
    for name in names:
        is_rest = name not in {part.tenant for iteration in iterations for part in iteration.parts}
        heights = [
            sum(
                part.tokens
                for part in iteration.parts
                if part.kind == kind and (part.tenant not in colors if is_rest else part.tenant == name)
            )
            for iteration in iterations
        ]
        if any(heights):
            panel.bar(
                starts,
                heights,
                widths,
                bottoms,
                align="edge",
                color=colors[name],
                edgecolor="white",
                linewidth=0.3,
            )
        bottoms = [below + height for below, height in zip(bottoms, heights, strict=True)]


def _draw_durations(panel: Axes, iterations: Sequence[Iteration], slo: Slo) -> None:
    starts = [iteration.start_s for iteration in iterations]
    widths = [iteration.end_s - iteration.start_s for iteration in iterations]
    took = [1000 * width for width in widths]
    panel.bar(starts, took, widths, align="edge", color="#BBBBBB", edgecolor="white", linewidth=0.3)
    middles = [start + width / 2 for start, width in zip(starts, widths, strict=True)]
    predicted = [1000 * iteration.predicted_s for iteration in iterations]
    panel.plot(middles, predicted, ".", color="#0072B2", markersize=3.5, label="predicted")
    panel.axhline(1000 * slo.tpot_s, color="#D55E00", linewidth=1.2, linestyle="--", label="target per token")
    panel.set_ylim(0, max(1.35 * 1000 * slo.tpot_s, 1.05 * max(took)) if max(took) < 1e4 else None)
    panel.set_ylabel("took, ms", rotation=0, ha="right", va="center", fontsize=10, color=INK)
    panel.legend(loc="upper right", fontsize=8, frameon=False, ncols=2)


def _patch(color: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)


def draw_curves(result: Result, slo: Slo, title: str) -> Figure:
    """Load, latency and finetuning over time, each point a mean or percentile of about ten seconds."""
    samples = result.samples
    times = [sample.time_s for sample in samples]
    figure, (load, gaps, first, trained) = new_figure(4, [1.6, 1.6, 1.6, 1.8])
    load.plot(times, [sample.requests_per_s for sample in samples], color=PALETTE[0], label="requests/s")
    load.plot(times, [sample.num_running / 10 for sample in samples], color=PALETTE[1], label="running / 10")
    load.plot(times, [sample.num_waiting / 10 for sample in samples], color=PALETTE[3], label="waiting / 10")
    _latencies(gaps, times, [sample.gap_p95_s for sample in samples], slo.tpot_s, "between tokens, p95")
    budgets = [1000 * sample.budget_s for sample in samples]
    gaps.plot(times, budgets, color=PALETTE[2], linewidth=1.0, label="budget")
    _latencies(first, times, [sample.ttft_p95_s for sample in samples], slo.ttft_s, "first token, p95")
    rates = [sample.trained_per_s for sample in samples]
    trained.fill_between(times, rates, color=PALETTE[4], alpha=0.5, linewidth=0)
    trained.plot(times, rates, color=PALETTE[0], linewidth=1.0, label="finetuning")
    alone = result.report.dedicated_per_s
    if alone is not None:
        trained.axhline(alone, color="#D55E00", linestyle="--", linewidth=1.2, label="the jobs alone")
    for panel, label in ((load, "load"), (gaps, "ms"), (first, "ms"), (trained, "tokens/s")):
        panel.set_ylabel(label, fontsize=10, color=INK)
        panel.set_ylim(0, 1.08 * panel.get_ylim()[1])
        panel.legend(
            loc="lower right", bbox_to_anchor=(1.0, 0.97), fontsize=8, frameon=False, ncols=3, borderpad=0.1
        )
    trained.set_xlabel("time, s", fontsize=10, color=INK)
    figure.suptitle(f"{title}: load, latency and finetuning", fontsize=12, color=INK)
    return figure


def _latencies(
    panel: Axes, times: Sequence[float], seconds: Sequence[float | None], target_s: float, label: str
) -> None:
    values = [float("nan") if value is None else 1000 * value for value in seconds]
    panel.plot(times, values, color=PALETTE[0], linewidth=1.2, label=label)
    panel.axhline(1000 * target_s, color="#D55E00", linestyle="--", linewidth=1.2, label="target")
