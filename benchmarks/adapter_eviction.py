"""Which adapter should leave the arena: policies compared by the bytes that they reload.

    PYTHONPATH=server:kernels:scheduler python benchmarks/adapter_eviction.py [--uses 40000] [--out FOLDER]

Replays requests through the scheduler's own `Residency` (its extents, its compaction, its runs of victims),
with the value of an adapter as the only difference. Deterministic: it needs no device, data or clock.

The trace: 874 adapters whose popularity is a power law, fitted to published production shares (top 1 = 7.9 %,
top 10 = 28 %, top 100 = 69 % of uses; the fit gives 8, 30 and 63), ranks 8, 16, 32 and 64 at random, sizes
those of all linear layers of Llama-3.1-8B. `drift` exchanges the popularity of one of the top hundred with a
random adapter's every 50 uses. An arena of `n` holds `n` adapters of mean size; the last `n / 4` requests are
still running and pin theirs.

Clairvoyant knows the trace. With one size, evicting the furthest next use is optimal (Belady, 1966); with
sizes the optimum is NP-hard, so two offline rules stand for it and the better one counts: the furthest next
use, and the least reload cost per distance to the next use.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from weft_scheduler.eviction import DecayedFrequency, EvictionPolicy, reload_cost
from weft_scheduler.residency import Residency

NUM_ADAPTERS = 874
RANKS = (8, 16, 32, 64)
ELEMENTS_PER_RANK = 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)
BYTES_PER_ELEMENT = 2
SLOPE, HEAD_OFFSET = 0.94, 0.6
"""Popularity is (rank + offset) ** -slope."""
DRIFT_EVERY = 50
ARENAS = (8, 16, 32, 64, 128)
_SHARPNESS = 8
"""Power that makes the most valuable member of a run of neighbours decide its price."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Adapters in the order of their requests, and the elements of each."""

    name: str
    keys: tuple[str, ...]
    sizes: dict[str, int]


@dataclass(slots=True)
class Outcome:
    """What one replay cost."""

    trace: str
    arena: int
    policy: str
    num_uses: int
    num_loads: int = 0
    reloaded_gib: float = 0.0
    moved_gib: float = 0.0
    hit_rate: float = 0.0


class LeastRecentlyUsed:
    """The value falls with the uses since the last one, whatever the size."""

    def __init__(self) -> None:
        self._num_uses = 0
        self._last: dict[str, int] = {}

    def used(self, key: str) -> None:
        """Remember when."""
        self._num_uses += 1
        self._last[key] = self._num_uses

    def value(self, key: str, num_elements: int) -> float:
        """The most recently used member of a run decides."""
        del num_elements
        return float((1 / (1 + self._num_uses - self._last.get(key, 0))) ** _SHARPNESS)


class RecencyByCost(LeastRecentlyUsed):
    """Reload cost over the uses since the last one: LRU weighted by cost."""

    def value(self, key: str, num_elements: int) -> float:
        """Members of a run add up."""
        return reload_cost(num_elements) / (1 + self._num_uses - self._last.get(key, 0))


class LeastFrequentlyUsed:
    """The value is the number of uses ever, of adapters that had left too."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, int] = defaultdict(int)

    def used(self, key: str) -> None:
        """Count."""
        self._counts[key] += 1

    def value(self, key: str, num_elements: int) -> float:
        """The most frequently used member of a run decides."""
        del num_elements
        return float(self._counts[key] ** _SHARPNESS)


class Clairvoyant:
    """Knows when each adapter is used next."""

    def __init__(self, keys: Sequence[str], *, weighs_cost: bool) -> None:
        self._now = -1
        self._uses: defaultdict[str, list[int]] = defaultdict(list)
        for idx, key in enumerate(keys):
            self._uses[key].append(idx)
        self._weighs_cost = weighs_cost

    def used(self, key: str) -> None:
        """The trace has gone on by one."""
        del key
        self._now += 1

    def value(self, key: str, num_elements: int) -> float:
        """Nothing if it is never used again; else by the distance to its next use."""
        uses = self._uses[key]
        idx = bisect_right(uses, self._now)
        if idx == len(uses):
            return 0.0
        distance = uses[idx] - self._now
        if self._weighs_cost:
            return reload_cost(num_elements) / distance
        return float((1 / distance) ** _SHARPNESS)


Factory = Callable[[Sequence[str]], EvictionPolicy]
POLICIES: dict[str, Factory] = {
    "LRU": lambda _: LeastRecentlyUsed(),
    "LFU": lambda _: LeastFrequentlyUsed(),
    "LRU by cost": lambda _: RecencyByCost(),
    "shipped": lambda _: DecayedFrequency(),
    "clairvoyant, furthest": lambda keys: Clairvoyant(keys, weighs_cost=False),
    "clairvoyant, by cost": lambda keys: Clairvoyant(keys, weighs_cost=True),
}


def make_trace(name: str, num_uses: int, seed: int = 0, num_adapters: int = NUM_ADAPTERS) -> Trace:
    """`stable` or `drift`, drawn from a power law."""
    rng = random.Random(seed)
    cumulative = list(accumulate((rank + HEAD_OFFSET) ** -SLOPE for rank in range(1, num_adapters + 1)))
    adapters = [f"adapter-{idx}" for idx in range(num_adapters)]
    rng.shuffle(adapters)
    sizes = {key: rng.choice(RANKS) * ELEMENTS_PER_RANK for key in sorted(adapters)}
    keys = []
    for idx in range(num_uses):
        if name == "drift" and idx % DRIFT_EVERY == 0:
            head, other = int(100 * rng.random() ** 2), rng.randrange(num_adapters)
            adapters[head], adapters[other] = adapters[other], adapters[head]
        keys.append(rng.choices(adapters, cum_weights=cumulative)[0])
    return Trace(name, tuple(keys), sizes)


def replay(trace: Trace, arena: int, policy_name: str, policy: EvictionPolicy) -> Outcome:
    """Run the trace's requests one after the other; each goes on while the next `arena / 4` begin."""
    mean = sum(trace.sizes.values()) // len(trace.sizes)
    residency = Residency(len(trace.sizes), arena * mean, 0.0, policy=policy)
    outcome = Outcome(trace.name, arena, policy_name, len(trace.keys))
    running: deque[str] = deque()
    num_hits = moved = loaded = 0
    for idx, key in enumerate(trace.keys):
        residency.advance(float(idx), idx)
        residency.want(key, trace.sizes[key])
        if residency.slot(key) is None:
            _bring(residency, key, trace.sizes[key], running)
            loaded += trace.sizes[key]
            outcome.num_loads += 1
        else:
            num_hits += 1
        moved += sum(move.num_elements for move in residency.take_actions().moves)
        residency.acquire(key)
        running.append(key)
        if len(running) > arena // 4:
            residency.release(running.popleft(), fence=0)
    gib = BYTES_PER_ELEMENT / 2**30
    outcome.reloaded_gib, outcome.moved_gib = loaded * gib, moved * gib
    outcome.hit_rate = num_hits / len(trace.keys)
    return outcome


def _bring(residency: Residency, key: str, num_elements: int, running: deque[str]) -> None:
    """Fetch and load; while there is no room, the oldest running request ends."""
    entry = residency.entries[key]
    residency.fetch(entry)
    residency.fetched(key, num_elements)
    while not residency.try_load(entry, is_aged=True):
        residency.release(running.popleft(), fence=0)
    residency.loaded(key)


def run(num_uses: int, arenas: Sequence[int] = ARENAS) -> list[Outcome]:
    """All policies on all traces and arenas."""
    outcomes = []
    for name in ("stable", "drift"):
        trace = make_trace(name, num_uses)
        for arena in arenas:
            for policy_name, make in POLICIES.items():
                outcomes.append(replay(trace, arena, policy_name, make(trace.keys)))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """One row per trace and arena; the policies' reloaded GiB, and the shipped one's ratios."""
    by_setting: defaultdict[tuple[str, int], dict[str, Outcome]] = defaultdict(dict)
    for outcome in outcomes:
        by_setting[outcome.trace, outcome.arena][outcome.policy] = outcome
    names = list(POLICIES)
    rows = [
        f"| trace | arena | {' | '.join(names)} | shipped / LRU | shipped / clairvoyant | shipped's hits |",
        f"| --- |{' ---: |' * (len(names) + 4)}",
    ]
    for (trace, arena), found in by_setting.items():
        gib = {name: outcome.reloaded_gib for name, outcome in found.items()}
        best = min(gib[name] for name in names if name.startswith("clairvoyant"))
        ratios = f"{gib['shipped'] / gib['LRU']:.2f} | {gib['shipped'] / best:.2f}"
        cells = " | ".join(f"{gib[name]:.0f}" for name in names)
        rows.append(f"| {trace} | {arena} | {cells} | {ratios} | {found['shipped'].hit_rate:.0%} |")
    return "\n".join(rows)


def main() -> int:
    """Replay everything, print the table and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--uses", type=int, default=20_000, help="requests per replay (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for adapter_eviction.md and .json")
    arguments = parser.parse_args()
    outcomes = run(arguments.uses)
    text = (
        f"# Adapter eviction: GiB reloaded in {arguments.uses:,} requests\n\n"
        "Made by `python benchmarks/adapter_eviction.py --out benchmarks/results`, which says what the "
        "columns are.\nIt runs no device: the numbers do not depend on the machine.\n\n"
        + table(outcomes)
        + "\n"
    )
    print(text)
    if arguments.out is not None:
        (arguments.out / "adapter_eviction.md").write_text(text)
        result = {"uses": arguments.uses, "outcomes": [asdict(outcome) for outcome in outcomes]}
        (arguments.out / "adapter_eviction.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
