"""Draws the demo: a live page in a terminal, a line now and then elsewhere, and the closing tables."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from weft_server.demo.state import DemoState, Job, Latencies, Stream, sparkline

_COLOURS = ("cyan", "magenta")
_TEXT_CHARS = 220
_LINE_INTERVAL_S = 3.0


class Screen:
    """Shows a `DemoState`; a context manager that leaves the terminal as it found it."""

    def __init__(self, state: DemoState, console: Console | None = None) -> None:
        self._state = state
        self._console = console or Console()
        self._live = Live(
            console=self._console,
            refresh_per_second=8,
            transient=True,
            get_renderable=self._page,
            auto_refresh=False,
        )
        self._last_line_s = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def refresh(self) -> None:
        """Draw the state as it is now."""
        if self._console.is_terminal:
            self._live.refresh()
            return
        now = time.monotonic()
        if now - self._last_line_s >= _LINE_INTERVAL_S:
            self._last_line_s = now
            self._console.print(self._line(), highlight=False)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, highlight=False)

    def summary(self) -> None:
        """Print the closing tables."""
        self._console.print(_matches_table(self._state))
        self._console.print(_latency_table(self._state))

    def _line(self) -> str:
        state, now = self._state, time.monotonic()
        rate = sum(stream.rate.per_second(now) for stream in state.streams)
        jobs = "  ".join(
            f"{job.task}: {job.status} {job.step}/{job.total_steps}"
            + (f" loss {job.losses[-1]:.3f}" if job.losses else "")
            for job in state.jobs
        )
        speed = f"generating {rate:.0f} tok/s, training {_training_rate(state):.0f} tok/s"
        return f"{speed} | {jobs} | {state.phase}"

    def _page(self) -> RenderableType:
        state = self._state
        title = Text.assemble(
            ("Weft  ", "bold"),
            "one frozen base, two tenants: generation and finetuning in the same iterations",
        )
        streams = Table.grid(expand=True, padding=(0, 1))
        jobs = Table.grid(expand=True, padding=(0, 1))
        for grid in (streams, jobs):
            grid.add_column(ratio=1)
            grid.add_column(ratio=1)
        streams.add_row(*(_stream_panel(s, c) for s, c in zip(state.streams, _COLOURS, strict=True)))
        jobs.add_row(*(_job_panel(j, c) for j, c in zip(state.jobs, _COLOURS, strict=True)))
        return Group(title, streams, jobs, _speed_panel(state), Text(f"  {state.phase}", style="dim"))


def _stream_panel(stream: Stream, colour: str) -> Panel:
    text = Text.assemble((f"{stream.prompt}\n", "dim"), (stream.text[-_TEXT_CHARS:], colour), ("▌", "blink"))
    rate = f"{stream.rate.per_second(time.monotonic()):.0f} tok/s"
    return Panel(
        text, title=f"{stream.tenant} · {stream.adapter} · {rate}", border_style=colour, height=7, box=ROUNDED
    )


def _job_panel(job: Job, colour: str) -> Panel:
    lines: list[RenderableType] = [Text(job.title, style="bold")]
    total = max(job.total_steps, 1)
    bar = Table.grid(expand=True)
    bar.add_row(ProgressBar(total=total, completed=job.step, complete_style=colour))
    lines.append(bar)
    lines.append(
        Text(
            f"step {job.step}/{job.total_steps or '?'}   loss {_loss_of(job)}   "
            f"{job.tokens_per_second:.0f} tok/s"
        )
    )
    lines.append(Text(sparkline(job.losses, 44), style=colour))
    before, after = _share(job.exact_match_before), _share(job.exact_match_after)
    lines.append(Text(f"held-out exact match: before {before}, after {after}"))
    if job.error:
        lines.append(Text(job.error, style="red"))
    return Panel(
        Group(*lines), title=f"{job.tenant} · finetune job · {job.status}", border_style=colour, box=ROUNDED
    )


def _speed_panel(state: DemoState) -> Panel:
    now = time.monotonic()
    rate = sum(stream.rate.per_second(now) for stream in state.streams)
    table = Table.grid(padding=(0, 3))
    table.add_row(
        Text(f"generating {rate:.0f} tok/s", style="bold"),
        Text(f"training {_training_rate(state):.0f} tok/s", style="bold"),
        Text(f"alone {_latency_text(state.alone)}"),
        Text(f"while training {_latency_text(state.beside_training)}"),
    )
    return Panel(table, title=f"per-token latency (target {state.tpot_slo_ms:.0f} ms)", box=ROUNDED)


def _matches_table(state: DemoState) -> Table:
    """One column a job, so that names stay whole on a narrow terminal."""
    table = Table(title="Finetuned while serving", box=SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for job in state.jobs:
        table.add_column(job.tenant, overflow="fold")
    jobs = state.jobs
    table.add_row("task", *(job.task for job in jobs))
    table.add_row("exact match before", *(_share(job.exact_match_before) for job in jobs))
    table.add_row("exact match after", *(_share(job.exact_match_after) for job in jobs))
    table.add_row("loss", *map(_loss_of, jobs))
    table.add_row("trained tokens", *(f"{job.trained_tokens:,}" for job in jobs))
    table.add_row("seconds", *map(_seconds_of, jobs))
    table.add_row("model", *(job.model or job.error or job.status for job in jobs))
    return table


def _loss_of(job: Job) -> str:
    return f"{job.losses[0]:.2f} → {job.losses[-1]:.3f}" if job.losses else "–"


def _seconds_of(job: Job) -> str:
    return f"{(job.finished_s or 0.0) - (job.started_s or 0.0):.0f}" if job.finished_s else "–"


def _latency_table(state: DemoState) -> Table:
    table = Table(title="Generation of the two published adapters", box=SIMPLE_HEAD, title_justify="left")
    for name in ("", "p50 ms/token", "p95 ms/token", "generated tok/s", "trained tok/s"):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    for name, phase, trained in (
        ("alone", state.alone, 0),
        ("while two jobs train", state.beside_training, state.num_trained_tokens),
    ):
        rate = trained / phase.elapsed_s if phase.elapsed_s else 0.0
        table.add_row(
            name,
            _milliseconds(phase.percentile_ms(50)),
            _milliseconds(phase.percentile_ms(95)),
            f"{phase.tokens_per_second:.0f}",
            f"{rate:.0f}" if trained else "–",
        )
    return table


def _training_rate(state: DemoState) -> float:
    return sum(job.tokens_per_second for job in state.jobs if job.status == "running")


def _latency_text(phase: Latencies) -> str:
    return f"p50 {_milliseconds(phase.percentile_ms(50))} p95 {_milliseconds(phase.percentile_ms(95))} ms"


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"
