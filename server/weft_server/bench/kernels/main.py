"""Runs `weft bench kernels`: checks every case, times it beside its peers with cold caches, and reports it
against the roofline."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch

from weft_server.bench.ceilings import Ceilings
from weft_server.bench.kernels import attention, linear, lora, pointwise, transfer
from weft_server.bench.kernels.case import TOLERANCE, OpCase, Subject
from weft_server.bench.models import RandomModel
from weft_server.bench.report import BenchError, Report
from weft_server.bench.settings import add_ceilings, measure_ceilings, read_setting
from weft_server.bench.shapes import Shape
from weft_server.bench.stats import Stopwatch, interleave, median_ratio

_BUDGET_SHARE = 0.02
"""Of `--budget-s`, for one case: there are more than a hundred."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one case: what it must move and compute (as `OpCase`), Weft's microseconds, and each peer's with how
    many times as long that is (None: not measured)."""

    op: str
    shape: str
    num_bytes: float
    flops: float
    crosses_link: bool
    weft_us: float
    peers: dict[str, tuple[float, float] | None]

    def roofline_us(self, ceilings: Ceilings) -> float:
        """The least that it can take."""
        if self.crosses_link and ceilings.link_bytes_per_s is not None:
            return 1e6 * self.num_bytes / ceilings.link_bytes_per_s
        return 1e6 * ceilings.seconds(self.num_bytes, self.flops)

    def to_dict(self, ceilings: Ceilings) -> dict[str, object]:
        """For programs; of a peer, how many times as long it takes."""
        peers = {name: None if times is None else times[1] for name, times in self.peers.items()}
        roofline_us = self.roofline_us(ceilings)
        return {
            "op": self.op,
            "shape": self.shape,
            "weft_us": self.weft_us,
            "roofline_us": roofline_us,
            "peers": peers,
        }


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit code.

    Raises:
        BenchError: a case gives a wrong result, or no operator has the wanted name.
    """
    setting = read_setting(arguments)
    shape = setting.model.shape
    report = setting.report("kernels", "Operators")
    before = measure_ceilings(setting)
    one_layer = Shape(shape.name, {**shape.hf_config, "num_hidden_layers": 1})
    model = RandomModel(one_layer, dtype=setting.model.dtype, device=setting.device, seed=setting.seed)
    subject = Subject(model, setting.seed)
    stopwatch = Stopwatch(setting.device, cold=True)
    measured: list[Measured] = []
    tolerance = TOLERANCE[subject.dtype]
    with torch.no_grad():
        for case in all_cases(subject, shape):
            if arguments.only not in case.op:
                continue
            report.check(f"{case.op}, {case.shape}", case.error(), tolerance)
            measured.append(measure(case, stopwatch, _BUDGET_SHARE * setting.budget_s))
    if not measured:
        raise BenchError(f"--only {arguments.only!r} is in the name of no operator")
    # At both ends, as a shared machine's speed changes within minutes.
    ceilings = before.best_of(measure_ceilings(setting))
    add_ceilings(report, ceilings)
    add_rows(report, measured, ceilings)
    report.data["operators"] = [item.to_dict(ceilings) for item in measured]
    add_targets(report, measured, ceilings, on_gpu=setting.on_gpu)
    report.finish(arguments.out)
    return 0


def all_cases(subject: Subject, shape: Shape) -> Iterator[OpCase]:
    """Every operator's cases, made one after the other; `shape` is the whole model's."""
    yield from linear.cases(subject)
    yield from lora.cases(subject)
    yield from attention.cases(subject)
    yield from pointwise.cases(subject)
    yield from transfer.cases(subject, shape)


def measure(case: OpCase, stopwatch: Stopwatch, budget_s: float) -> Measured:
    """Time a case and its peers in turns."""
    calls = {"Weft": case.run, **{name: call for name, call in case.peers.items() if call is not None}}
    timings = interleave(calls, stopwatch.seconds, budget_s=budget_s, min_rounds=5, max_rounds=100)
    peers: dict[str, tuple[float, float] | None] = {
        name: None
        if call is None
        else (1e6 * median(timings[name]), median_ratio(timings[name], timings["Weft"]))
        for name, call in case.peers.items()
    }
    return Measured(
        op=case.op,
        shape=case.shape,
        num_bytes=case.num_bytes,
        flops=case.flops,
        crosses_link=case.crosses_link,
        weft_us=1e6 * median(timings["Weft"]),
        peers=peers,
    )


def add_rows(report: Report, measured: list[Measured], ceilings: Ceilings) -> None:
    """One row a case and peer."""
    table = report.table(
        "Operators, caches cold",
        ("operator", "shape", "µs", "roofline, µs", "of roofline, %", "peer", "peer's, µs", "Weft faster by"),
        "Roofline: the longer of moving every byte once at the measured bandwidth and computing at the rate "
        "of large products.",
    )
    for item in measured:
        least_us = item.roofline_us(ceilings)
        own = (item.op, item.shape, item.weft_us, least_us, 100 * least_us / item.weft_us)
        for name, times in item.peers.items() or [("–", None)]:
            if name == "–":
                table.add(*own, name, "–", "–")
            else:
                table.add(*own, name, *((None, None) if times is None else times))


def add_targets(report: Report, measured: list[Measured], ceilings: Ceilings, *, on_gpu: bool) -> None:
    """LoRA against vLLM's kernels at equal and at mixed ranks, and adapter loads against the link."""
    if not on_gpu:
        return
    for what, mark in (("equal", "rank 16"), ("mixed", "ranks ")):
        found = [
            item.peers["vLLM"]
            for item in measured
            if item.op == "lora forward" and f" of {mark}" in item.shape
        ]
        ratios = [times[1] for times in found if times is not None]
        text = f"LoRA forward at {what} ranks against vLLM's shrink and expand, worst group"
        report.target(text, min(ratios, default=None), at_least=1.0, unit="x")
    loads = [
        100 * item.roofline_us(ceilings) / item.weft_us for item in measured if item.op == "adapter load"
    ]
    report.target("adapter load, share of the host link", min(loads, default=None), at_least=80, unit=" %")
