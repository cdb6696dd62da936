"""Reads public traces: Azure's conversations of 2023, Mooncake's with prefix blocks, ServeGen's clients.

Azure: `TIMESTAMP,ContextTokens,GeneratedTokens`, from github.com/Azure/AzurePublicDataset. Mooncake: a JSON
object a line with `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (blocks of 512 tokens), from
github.com/kvcache-ai/Mooncake. ServeGen: see `servegen`. Files may be gzipped.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from datetime import datetime
from math import isfinite
from pathlib import Path

from weft_scheduler.simulator.servegen import read_servegen
from weft_scheduler.simulator.trace import Trace, TraceRequest, clip_duration, mean_rate, scale_rate

FORMATS = ("azure", "mooncake", "servegen")


class TraceError(ValueError):
    """A trace that cannot be read; the message names the file, the line and what was expected."""


def read_trace(
    location: str,
    *,
    seed: int = 0,
    start_s: float = 0.0,
    duration_s: float | None = None,
    requests_per_s: float | None = None,
    num_clients: int | None = None,
) -> Trace:
    """Read `PATH` or `FORMAT:PATH`; without a format it is told from the content.

    A ServeGen trace is drawn from its clients within the window, with the seed, and `requests_per_s` scales
    their rates. The others are run faster or slower until their mean rate is `requests_per_s`, then cut to
    the window. `num_clients` is for ServeGen alone: only its busiest clients.

    Raises:
        TraceError: no such file, an unknown format, content that is not of the format, or an empty window.
    """
    name, path = _split(location)
    if not path.exists():
        raise TraceError(f"trace {path}: no such file")
    name = name or detect_format(path)
    if name == "servegen":
        return read_servegen_trace(
            path,
            seed=seed,
            start_s=start_s,
            duration_s=duration_s,
            requests_per_s=requests_per_s,
            num_clients=num_clients,
        )
    trace = read_azure(path) if name == "azure" else read_mooncake(path)
    if requests_per_s is not None:
        trace = scale_rate(trace, requests_per_s / mean_rate(trace))
    trace = clip_duration(trace, float("inf") if duration_s is None else duration_s, start_s)
    if not trace:
        raise TraceError(f"trace {path}: no request arrives from {start_s:g} s on within {duration_s:g} s")
    return trace


def _split(location: str) -> tuple[str | None, Path]:
    name, colon, rest = location.partition(":")
    if not colon or Path(location).exists():
        return None, Path(location)
    if name not in FORMATS:
        raise TraceError(f"trace {location}: unknown format {name!r}; known are {', '.join(FORMATS)}")
    return name, Path(rest)


def detect_format(path: Path) -> str:
    """The format of a file (a folder is ServeGen's).

    Raises:
        TraceError: it is none of them.
    """
    if path.is_dir() or path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return "servegen"
    try:
        with _open(path) as file:
            first = file.readline()
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise TraceError(f"trace {path}: cannot be read as text: {error}") from error
    if first.startswith("TIMESTAMP,"):
        return "azure"
    if first.startswith("{"):
        return "mooncake"
    raise TraceError(
        f"trace {path}: its first line is {first[:60]!r}; expected Azure's header TIMESTAMP,ContextTokens,"
        "GeneratedTokens, a JSON object (Mooncake), or a folder or .tar.gz of ServeGen clients"
    )


def read_azure(path: Path) -> Trace:
    """Azure's trace; the first request arrives at 0. Requests without generated tokens count as one token.

    Raises:
        TraceError: a column is missing or a value is not of its kind.
    """
    requests = []
    first: datetime | None = None
    with _open(path) as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                # Seven digits of a second: one more than `fromisoformat` reads in every version.
                when = datetime.fromisoformat(row["TIMESTAMP"][:26])
                first = first or when
                arrival_s = (when - first).total_seconds()
                prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (KeyError, TypeError, ValueError) as error:
                raise TraceError(
                    f"trace {path}, line {number}: {row} is not an Azure row ({error})"
                ) from error
            requests.append(TraceRequest(arrival_s, max(1, prompt), max(1, output)))
    return _in_order(requests, path)


def read_mooncake(path: Path) -> Trace:
    """Mooncake's trace, with the hashes of its 512-token prefix blocks.

    Raises:
        TraceError: a line is not JSON, or a field is missing.
    """
    requests = []
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                arrival_s = float(row["timestamp"]) / 1000.0
                hashes = tuple(row.get("hash_ids", ()))
                if not isfinite(arrival_s) or any(type(block) is not int for block in hashes):
                    raise ValueError("`timestamp` must be finite, and `hash_ids` integers")
                requests.append(
                    TraceRequest(
                        arrival_s,
                        max(1, int(row["input_length"])),
                        max(1, int(row["output_length"])),
                        prefix_hashes=hashes,
                    )
                )
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise TraceError(f"trace {path}, line {number}: not a Mooncake record ({error!r})") from error
    return _in_order(requests, path)


def read_servegen_trace(
    path: Path,
    *,
    seed: int,
    start_s: float = 0.0,
    duration_s: float | None = None,
    requests_per_s: float | None = None,
    num_clients: int | None = None,
) -> Trace:
    """A trace drawn from ServeGen's clients; see `servegen.read_servegen`.

    Raises:
        TraceError: the folder or archive has no clients, or one cannot be read.
    """
    try:
        requests = read_servegen(
            path,
            seed=seed,
            start_s=start_s,
            duration_s=duration_s,
            requests_per_s=requests_per_s,
            num_clients=num_clients,
        )
    except (OSError, ValueError, KeyError, SyntaxError, tarfile.TarError, EOFError) as error:
        raise TraceError(f"trace {path}, read as ServeGen's clients: {error}") from error
    return _in_order(requests, path)


def _open(path: Path) -> io.TextIOWrapper:
    with path.open("rb") as probe:
        is_gzipped = probe.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding="utf-8") if is_gzipped else path.open(encoding="utf-8")


def _in_order(requests: list[TraceRequest], path: Path) -> Trace:
    if not requests:
        raise TraceError(f"trace {path}: it has no requests")
    return tuple(sorted(requests, key=lambda request: request.arrival_s))
