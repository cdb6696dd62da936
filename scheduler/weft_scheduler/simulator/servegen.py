"""ServeGen's clients as tenants: arrivals from every client's own rates, lengths from its histograms.

A client's `chunk-N-trace.csv` has a row `start_s,rate,cv,distribution,shape,scale` for every 600 s: requests
a second, and the distribution (Gamma or Weibull) of the gaps between them. Its `chunk-N-dataset.json` has
histograms of prompt and answer lengths for parts of a day. Source: github.com/alibaba/ServeGen.

Rates come without lengths for some models: then client i takes the lengths of client i of another model (the
archive `*-lengths.tar.gz` beside it), both in order of requests.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import math
import re
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random

from weft_scheduler.simulator.trace import TraceRequest

DEFAULT_DURATION_S = 600.0
_DAY_S = 86_400
_CLIENT = re.compile(r"chunk-(\d+)-(trace\.csv|dataset\.json)$")


@dataclass(frozen=True, slots=True)
class Rate:
    """Arrivals from `start_s` on: requests a second, and the shape of the gaps' distribution."""

    start_s: float
    per_s: float
    distribution: str
    shape: float


@dataclass(frozen=True, slots=True)
class LengthTable:
    """A histogram: lengths and the running sum of their weights."""

    lengths: tuple[int, ...]
    cumulative: tuple[float, ...]

    def draw(self, random: Random) -> int:
        """One length."""
        return random.choices(self.lengths, cum_weights=self.cumulative)[0]


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths of one client from `start_s` of a day on."""

    start_s: float
    prompt: LengthTable
    output: LengthTable


def read_servegen(
    path: Path,
    *,
    seed: int = 0,
    start_s: float = 0.0,
    duration_s: float | None = None,
    requests_per_s: float | None = None,
    num_clients: int | None = None,
) -> list[TraceRequest]:
    """Draw the requests of `[start_s, start_s + duration_s)`, each client a tenant `client-NN` by rank.

    Args:
        path: a folder or archive with the clients' rates, and with their lengths or beside such an archive.
        seed: the draws follow from it.
        start_s, duration_s: the window; 600 s by default.
        requests_per_s: scales all rates so that the window's mean is this; by default they stay.
        num_clients: only so many, those with most requests in the window.

    Raises:
        ValueError: no rates, no lengths, or no requests in the window.
    """
    duration_s = DEFAULT_DURATION_S if duration_s is None else duration_s
    files = _files(path)
    rates = {idx: _read_rates(text()) for (idx, kind), text in files.items() if kind == "trace.csv"}
    if not rates:
        raise ValueError("there is no chunk-*-trace.csv")
    expected = {idx: _integral(rows, start_s, start_s + duration_s) for idx, rows in rates.items()}
    ranked = sorted((idx for idx in rates if expected[idx] > 0.0), key=lambda idx: (-expected[idx], idx))
    ranked = ranked[:num_clients]
    if not ranked:
        raise ValueError(f"no client sends anything between {start_s:g} s and {start_s + duration_s:g} s")
    factor = 1.0
    if requests_per_s is not None:
        factor = requests_per_s * duration_s / sum(expected[idx] for idx in ranked)
    lengths = _lengths_by_rank(path, files, ranked)
    requests: list[TraceRequest] = []
    for rank, idx in enumerate(ranked):
        random = Random(f"servegen/{seed}/{idx}")
        table = lengths[rank % len(lengths)]
        for arrival_s in _arrivals(rates[idx], start_s, start_s + duration_s, factor, random):
            row = table[max(0, bisect_right(table, arrival_s % _DAY_S, key=lambda part: part.start_s) - 1)]
            prompt, output = row.prompt.draw(random), row.output.draw(random)
            requests.append(
                TraceRequest(arrival_s - start_s, max(1, prompt), max(1, output), f"client-{rank:02d}")
            )
    return requests


def _files(path: Path) -> dict[tuple[int, str], Callable[[], str]]:
    """(client, kind) → a function that reads its text."""
    if path.is_dir():
        return {
            (int(match[1]), match[2]): file.read_text
            for file in sorted(path.iterdir())
            if (match := _CLIENT.search(file.name))
        }
    found: dict[tuple[int, str], Callable[[], str]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            match = _CLIENT.search(member.name)
            file = archive.extractfile(member) if match and member.isfile() else None
            if match and file is not None:
                found[int(match[1]), match[2]] = io.StringIO(file.read().decode()).getvalue
    return found


def _read_rates(text: str) -> list[Rate]:
    return [
        Rate(float(start), float(rate), distribution, float(shape))
        for start, rate, _, distribution, shape, _ in csv.reader(io.StringIO(text))
    ]


def _integral(rows: list[Rate], start_s: float, end_s: float) -> float:
    """Expected requests between two times."""
    return sum(row.per_s * (end - start) for row, start, end in _windows(rows, start_s, end_s))


def _windows(rows: list[Rate], start_s: float, end_s: float) -> Iterator[tuple[Rate, float, float]]:
    """Rows that overlap the window, and from when to when; the last row ends when its like would."""
    step_s = rows[1].start_s - rows[0].start_s if len(rows) > 1 else math.inf
    for idx, row in enumerate(rows):
        until_s = rows[idx + 1].start_s if idx + 1 < len(rows) else row.start_s + step_s
        begin, end = max(row.start_s, start_s), min(until_s, end_s)
        if begin < end:
            yield row, begin, end


def _arrivals(
    rows: list[Rate], start_s: float, end_s: float, factor: float, random: Random
) -> Iterator[float]:
    """A renewal process in operational time: gaps of mean one, run off at the rate of the moment."""
    gap: float | None = None
    for row, now_s, until_s in _windows(rows, start_s, end_s):
        rate = row.per_s * factor
        if rate <= 0.0:
            continue
        if gap is None:
            gap = _unit_gap(row, random) * random.random()
        while now_s + gap / rate < until_s:
            now_s += gap / rate
            yield now_s
            gap = _unit_gap(row, random)
        gap -= (until_s - now_s) * rate


def _unit_gap(row: Rate, random: Random) -> float:
    """A gap of mean one.

    Raises:
        ValueError: the distribution is unknown.
    """
    if row.distribution == "Gamma":
        return random.gammavariate(row.shape, 1.0 / row.shape)
    if row.distribution == "Weibull":
        return random.weibullvariate(1.0 / math.gamma(1.0 + 1.0 / row.shape), row.shape)
    raise ValueError(f"unknown distribution of arrivals {row.distribution!r}; known are Gamma and Weibull")


def _lengths_by_rank(
    path: Path, files: dict[tuple[int, str], Callable[[], str]], ranked: list[int]
) -> list[list[Lengths]]:
    """Length tables of the clients in order: their own, or those of the model beside them."""
    own = [files[idx, "dataset.json"] for idx in ranked if (idx, "dataset.json") in files]
    if len(own) == len(ranked):
        tables = [_read_lengths(text()) for text in own]
    else:
        tables = [_read_lengths(text()) for text in _neighbours(path, len(ranked))]
    tables = [table for table in tables if table]
    if not tables:
        raise ValueError(
            "there are no lengths: neither chunk-*-dataset.json nor a *-lengths archive beside it"
        )
    return tables


def _neighbours(path: Path, num_clients: int) -> list[Callable[[], str]]:
    """Length files of another model's clients, busiest first where its rates are there too."""
    archives = sorted(path.parent.glob("*-lengths.tar.gz"))
    own = path.name.replace("-rates", "-lengths")
    archives.sort(key=lambda archive: archive.name != own)
    if not archives:
        return []
    files = {idx: text for (idx, kind), text in _files(archives[0]).items() if kind == "dataset.json"}
    rates_path = archives[0].with_name(archives[0].name.replace("-lengths", "-rates"))
    order = sorted(files)
    if rates_path.exists():
        rates = {
            idx: _read_rates(text())
            for (idx, kind), text in _files(rates_path).items()
            if kind == "trace.csv"
        }
        busy = {idx: _integral(rows, 0.0, math.inf) for idx, rows in rates.items()}
        order.sort(key=lambda idx: -busy.get(idx, 0.0))
    return [files[idx] for idx in order[:num_clients]]


def _read_lengths(text: str) -> list[Lengths]:
    """Parts of the day that have both histograms, in order."""
    parts = []
    for start, fields in json.loads(text).items():
        prompt, output = (_table(fields[name]) for name in ("input_tokens", "output_tokens"))
        if prompt is not None and output is not None:
            parts.append(Lengths(float(start), prompt, output))
    return sorted(parts, key=lambda part: part.start_s)


def _table(histogram: str | dict[str, float]) -> LengthTable | None:
    content = ast.literal_eval(histogram) if isinstance(histogram, str) else histogram
    weights = {int(length): float(weight) for length, weight in content.items() if weight > 0}
    if not weights:
        return None
    return LengthTable(tuple(weights), tuple(accumulate(weights.values())))
