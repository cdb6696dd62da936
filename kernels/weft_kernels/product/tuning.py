"""Measuring plans, and keeping what was measured in a file.

Done while an engine starts, never while it serves. A `PlanFile` belongs to one device and one set of kernels:
what another wrote, or nobody can read, counts as absent and is replaced.
"""

import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from weft_kernels.product.plan import LIBRARY, Plan, Tiles

log = logging.getLogger(__name__)

_NUM_RUNS = 7
_FLUSHED_BYTES = 128 << 20
_NUM_FLUSHES = 4


class PlanFile:
    """Measured plans by key, in memory and in a JSON file."""

    def __init__(self, path: Path | None, owner: dict[str, str]) -> None:
        """Reads the file if there is one.

        Args:
            path: where it is; None keeps plans in memory alone.
            owner: what the plans hold for: device, versions, kernels. Another owner's plans are not used.
        """
        self._path = path
        self._owner = owner
        self._plans = {} if path is None else _read(path, owner)

    def get(self, key: str) -> Plan | None:
        """The plan that was measured for `key`."""
        return self._plans.get(key)

    def put(self, key: str, plan: Plan) -> None:
        """Remember a plan; `save` writes it."""
        self._plans[key] = plan

    def save(self) -> None:
        """Replace the file, whole or not at all; a folder that cannot be written costs a warning."""
        if self._path is None:
            return
        plans = {key: None if plan.tiles is None else asdict(plan.tiles) for key, plan in self._plans.items()}
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"owner": self._owner, "plans": plans}, indent=1))
            temporary.replace(self._path)
        except OSError as error:
            log.warning("measured plans are not kept: %s", error)


def device_owner(device: torch.device) -> dict[str, str]:
    """What plans measured on this CUDA device hold for."""
    import triton

    kernels = hashlib.sha256()
    for source in sorted(Path(__file__).parents[1].glob("*/*.py")):
        if source.parent.name in ("nf4", "int8", "product"):
            kernels.update(source.read_bytes())
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": kernels.hexdigest(),
    }


class DeviceTimer:
    """Seconds that work takes on a CUDA device with nothing of its input in the cache."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        """The median of a few runs. The flushes before each also hide the time it takes to launch it."""
        spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        for _ in range(_NUM_RUNS):
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(_NUM_FLUSHES):
                self._flushed.zero_()
            start.record()
            run()
            end.record()
            spans.append((start, end))
        torch.cuda.synchronize(self._device)
        return statistics.median(float(start.elapsed_time(end)) for start, end in spans) / 1e3


class Tuner:
    """Chooses plans by measuring them, within a time limit for all choices together."""

    def __init__(
        self,
        plans: PlanFile,
        measure: Callable[[Callable[[], object]], float],
        *,
        max_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            plans: what is known already, and where choices go.
            measure: seconds that a run takes.
            max_seconds: after this, the first candidate that runs is taken unmeasured, and not remembered.
            clock: the time that goes by, in seconds.
        """
        self._plans = plans
        self._measure = measure
        self._clock = clock
        self._deadline = clock() + max_seconds

    def choose(self, key: str, candidates: Sequence[Plan], run: Callable[[Plan], object]) -> Plan:
        """The fastest candidate, which has run at least once afterwards, and so is compiled and loaded.

        A candidate that the device has not the resources for is passed over.

        Args:
            key: names the choice in the file.
            candidates: not empty, best guess first; the last one must run anywhere.
            run: computes the product once by a plan.
        """
        known = self._plans.get(key)
        if known is not None and known in candidates and _try_run(run, known):
            return known
        measured: dict[Plan, float] = {}
        for plan in candidates:
            if not _try_run(run, plan):
                continue
            if self._clock() >= self._deadline:
                return min(measured, key=measured.__getitem__) if measured else plan
            measured[plan] = self._measure(lambda plan=plan: run(plan))  # type: ignore[misc]
        best = min(measured, key=measured.__getitem__)
        self._plans.put(key, best)
        return best


def _try_run(run: Callable[[Plan], object], plan: Plan) -> bool:
    from triton.runtime.errors import OutOfResources

    try:
        run(plan)
    except OutOfResources as error:
        log.info("%s does not fit this device: %s", plan, error)
        return False
    return True


def _read(path: Path, owner: dict[str, str]) -> dict[str, Plan]:
    try:
        content = json.loads(path.read_text())
        if content["owner"] != owner:
            log.info("%s was measured elsewhere: measuring again", path)
            return {}
        return {str(key): _plan(tiles) for key, tiles in content["plans"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s): measuring again", path, error)
        return {}


def _plan(tiles: dict[str, Any] | None) -> Plan:
    if tiles is None:
        return LIBRARY
    if not all(type(value) is int and value > 0 for value in tiles.values()):
        raise ValueError(f"tiles are positive numbers, not {tiles}")
    return Plan(Tiles(**tiles))
