"""Runs `weft bench adapters`: checks what arrives in the arena, then times loads from every place that an
adapter may lie in, their stages, ceilings and PEFT, in turns."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch

from weft_server.adapters.peft import write_peft
from weft_server.bench.adapters import peer
from weft_server.bench.adapters import report as tables
from weft_server.bench.adapters.page_cache import filesystem_of
from weft_server.bench.adapters.report import Measured
from weft_server.bench.adapters.route import AdapterFiles, Target, stages
from weft_server.bench.adapters.sources import DISK_WARM, HOST_CACHE, Absent, Source, open_sources
from weft_server.bench.report import Report
from weft_server.bench.settings import Setting, check_rank, read_setting
from weft_server.bench.stats import Timings, interleave
from weft_server.errors import ConfigError

_MIN_ROUNDS, _MAX_ROUNDS = 5, 100
_NUM_COPIES = 6
"""Files of an adapter's size that are written, with room to spare."""

Timed = Callable[[], float]


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit code.

    Raises:
        ConfigError: a flag's value.
        BenchError: what arrives in the arena is wrong, or the Redis server does not start.
    """
    rank: int = arguments.adapter_rank
    check_rank(rank)
    setting = read_setting(arguments)
    report = setting.report("adapters", f"Loads of an adapter of rank {rank}")
    files = make_files(setting, rank, seed=0)
    target = Target(setting.model.config, files.packed.num_elements, setting.model.dtype, setting.device)
    with _scratch(arguments.store_dir, files.nbytes) as folder, torch.no_grad():
        filesystem = filesystem_of(folder)
        with open_sources(files, target, folder) as sources:
            present = [source for source in sources if isinstance(source, Source)]
            check(report, make_files(setting, rank, seed=1), files, target, present, folder)
            measured = measure(setting, files, target, present, folder)
    add_results(report, sources, files, measured)
    report.notes += [
        f"The adapter: rank {rank} on all linears, {files.nbytes / 1e6:.1f} MB of float32 safetensors, as "
        f"PEFT writes by default; {target.num_bytes / 1e6:.1f} MB in the arena.",
        f"The disk: a folder on {filesystem}. Caches below the kernel cannot be dropped. Redis answers over "
        "TCP on this machine: there is no network in between.",
        f"{len(next(iter(measured.stages.values())))} rounds; {torch.get_num_threads()} threads of torch.",
    ]
    report.finish(arguments.out)
    return 0


def make_files(setting: Setting, rank: int, *, seed: int) -> AdapterFiles:
    """A random fp32 adapter of all linears, as PEFT writes it by default."""
    packed = setting.model.adapter(seed, rank)
    return AdapterFiles(packed, *write_peft(packed, base_model_name="bench"))


def check(
    report: Report,
    other: AdapterFiles,
    files: AdapterFiles,
    target: Target,
    sources: Sequence[Source],
    folder: Path,
) -> None:
    """What kernels read after a load, against the file as `safetensors` reads it, and against another
    adapter's."""
    paths = folder / "expected.safetensors", folder / "other.safetensors"
    for path, content in zip(paths, (files.safetensors, other.safetensors), strict=True):
        path.write_bytes(content)
    expected, wrong = map(safetensors.torch.load_file, paths)
    for source in sources:
        target.poison()
        source.before()
        source.route.bring()
        report.check(
            f"arena after a load, {source.name}: largest difference from the file by safetensors' load_file, "
            "cast to the arena's dtype",
            target.error(expected),
            0.0,
            target.error(wrong),
        )
        target.clear()


def measure(
    setting: Setting, files: AdapterFiles, target: Target, sources: Sequence[Source], folder: Path
) -> Measured:
    """Everything in turns, round by round."""
    why_no_peer = peer.why_absent()
    readers = {source: source.read for source in sources if source.read is not None}
    groups: dict[str, dict[str, Timed]] = {
        "loads": {source.name: _prepared(source, source.route.seconds) for source in sources},
        "ceilings": {source.name: _prepared(source, _timed(source.best)) for source in sources},
        "reads": {source.name: _prepared(source, _timed(read)) for source, read in readers.items()},
        "stages": {name: _timed(call) for name, call in stages(files, target).items()},
        "peers": peer.peer_loads(setting, files, folder) if why_no_peer is None else {},
    }
    calls = {f"{group}: {name}": call for group, named in groups.items() for name, call in named.items()}
    timings = interleave(
        calls,
        lambda call: call(),
        budget_s=setting.budget_s,
        min_rounds=_MIN_ROUNDS,
        max_rounds=_MAX_ROUNDS,
        warm_ups=1,
    )

    def of(group: str) -> Timings:
        return {name: timings[f"{group}: {name}"] for name in groups[group]}

    return Measured(of("loads"), of("ceilings"), of("reads"), of("stages"), of("peers"), why_no_peer)


def add_results(
    report: Report, sources: Sequence[Source | Absent], files: AdapterFiles, measured: Measured
) -> None:
    """Comparisons, targets, tables and data."""
    tables.add_ceilings(report, sources, measured)
    tables.add_peers(report, measured, DISK_WARM)
    tables.add_host_target(report, measured, HOST_CACHE)
    tables.add_loads(report, sources, measured)
    tables.add_stages(report, measured, files.nbytes)
    report.data["adapter"] = {"rank": files.packed.max_rank, "file_bytes": files.nbytes}
    report.data["times"] = tables.as_data(measured)


def _prepared(source: Source, call: Timed) -> Timed:
    def run() -> float:
        source.before()
        return call()

    return run


def _timed(call: Callable[[], object]) -> Timed:
    def run() -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    return run


@contextmanager
def _scratch(parent: Path | None, file_bytes: int) -> Iterator[Path]:
    """A folder on the disk that is measured, removed afterwards.

    Raises:
        ConfigError: it cannot be made, or has no room.
    """
    if parent is None:
        usual = Path("/var/tmp")
        parent = usual if usual.is_dir() else Path(tempfile.gettempdir())
    try:
        free = shutil.disk_usage(parent).free
        made = tempfile.TemporaryDirectory(prefix="weft-bench-", dir=parent)
    except OSError as error:
        raise ConfigError(
            f"--store-dir {parent}: {error.strerror}; give a folder that can be written"
        ) from error
    with made as folder:
        needed = _NUM_COPIES * file_bytes
        if free < needed:
            raise ConfigError(
                f"--store-dir {parent} has {free / 1e6:.0f} MB of room, {needed / 1e6:.0f} MB are needed"
            )
        yield Path(folder)
