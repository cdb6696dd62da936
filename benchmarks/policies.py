"""Policies side by side on real traces, simulated: kept finetuning, attainment, latencies and fairness.

    WEFT_TEST_DATA=DATA python benchmarks/policies.py [--out DIR] [--seconds 300] [--processes 2]

The traces are Azure's conversations of 2023 and ServeGen's clients (m-small's rates, DeepSeek-R1's lengths,
halved), in the folder `traces` of DATA. Model and device: Llama-3.1-8B in NF4 on an H200, by the roofline of
`weft_scheduler.simulator`. Every scenario has two endless finetune jobs of two tenants. Writes
`policies.json`, `policies.md`, `policies-load.png` and `policies-adapters.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from weft_scheduler.policies import AlternatingPolicy, NoCoservingPolicy, Policy, StaticCapPolicy, WeftPolicy
from weft_scheduler.simulator.device_model import Roofline
from weft_scheduler.simulator.gpus import GPUS, choose_limits
from weft_scheduler.simulator.jobs import JobSpec
from weft_scheduler.simulator.readers import read_trace
from weft_scheduler.simulator.report import Slo
from weft_scheduler.simulator.shapes import SHAPES
from weft_scheduler.simulator.simulation import Setup, dedicated_rate, simulate
from weft_scheduler.simulator.trace import (
    Trace,
    fit_context,
    scale_lengths,
    spread_over_adapters,
    spread_over_tenants,
)
from weft_server.simulate.draw import PALETTE, new_figure, save

MODEL, GPU, QUANTIZATION = "llama-3.1-8b", "h200", "nf4"
SLO = Slo(tpot_s=0.050, ttft_s=2.0, percentile=95.0)
RANKS = (8, 16, 32)
CONTEXT = 16384
FLOODER = "flooder"
"""A tenant that sends in the middle third of the time."""

POLICIES: Mapping[str, Callable[[], Policy]] = {
    "Weft": WeftPolicy,
    "static cap, small": partial(StaticCapPolicy, 512, 256, 1),
    "static cap, large": partial(StaticCapPolicy, 2048, 1024, 4),
    "alternating": AlternatingPolicy,
    "no co-serving": NoCoservingPolicy,
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One load: a trace at a rate, spread over tenants (None: the trace's own) and adapters. `flood` adds
    requests of one more tenant, from another part of the trace, at that rate.
    """

    group: str
    name: str
    trace: str
    rate: float
    tenants: int | None
    adapters: int
    flood: float = 0.0


SCENARIOS = (
    *(Scenario("load", f"Azure at {rate:g}/s", "azure", rate, 8, 100) for rate in (1, 3, 5.53, 8, 11, 14)),
    *(
        Scenario("adapters", f"Azure, {num} adapters", "azure", 5.53, 8, num)
        for num in (1, 30, 300, 1000, 3000)
    ),
    *(Scenario("tenants", f"Azure, {num} tenants", "azure", 5.53, num, 300) for num in (1, 10, 30, 60)),
    *(Scenario("clients", f"ServeGen at {rate:g}/s", "servegen", rate, None, 300) for rate in (2, 4, 6)),
    *(
        Scenario("flood", f"Azure at 2/s, flooded at {rate:g}/s", "azure", 2.0, 4, 30, flood=rate)
        for rate in (20, 40)
    ),
)


def load(scenario: Scenario, data: Path, seconds: float) -> Trace:
    """The scenario's requests."""
    if scenario.trace == "azure":
        path = str(data / "azure2023" / "AzureLLMInferenceTrace_conv.csv.gz")
        trace = read_trace(path, start_s=60.0, duration_s=seconds, requests_per_s=scenario.rate)
    else:
        path = str(data / "servegen" / "m-small-rates.tar.gz")
        trace = scale_lengths(read_trace(path, duration_s=seconds, requests_per_s=scenario.rate), 0.5)
    trace = fit_context(trace, CONTEXT)
    if scenario.tenants is not None:
        trace = spread_over_tenants(trace, scenario.tenants, seed=0)
    if scenario.flood:
        flood = read_trace(path, start_s=60.0, duration_s=seconds / 3, requests_per_s=scenario.flood)
        more = [replace(r, tenant=FLOODER, arrival_s=r.arrival_s + seconds / 3) for r in flood]
        trace = tuple(sorted([*trace, *fit_context(tuple(more), CONTEXT)], key=lambda r: r.arrival_s))
    return spread_over_adapters(trace, scenario.adapters, seed=0)


def setup_for(trace: Trace, window_tokens: int | None = None) -> Setup:
    """Model, device, jobs and adapters; `window_tokens` instead of the engine's choice."""
    shape, gpu = SHAPES[MODEL], GPUS[GPU]
    names = sorted({request.adapter for request in trace if request.adapter is not None})
    jobs = tuple(JobSpec(f"job-{idx}", f"trainer-{idx}") for idx in range(2))
    return Setup(
        limits=choose_limits(shape, gpu, QUANTIZATION, max_model_len=CONTEXT, window_tokens=window_tokens),
        device=Roofline(shape, gpu, QUANTIZATION),
        gpu=gpu,
        slo=SLO,
        jobs=jobs,
        adapter_elements={
            name: shape.adapter_elements(RANKS[i % len(RANKS)]) for i, name in enumerate(names)
        },
        job_elements={job.job_id: shape.adapter_elements(job.rank) for job in jobs},
    )


def run(scenario: Scenario, policy: str, data: Path, seconds: float) -> dict[str, Any]:
    """One cell of the table."""
    trace = load(scenario, data, seconds)
    chosen = POLICIES[policy]()
    window = min(512, chosen.max_train_tokens) if isinstance(chosen, StaticCapPolicy) else None
    report = simulate(trace, setup_for(trace, window), policy=chosen).report
    tenants = len({request.tenant for request in trace})
    return {
        "group": scenario.group,
        "scenario": scenario.name,
        "rate": scenario.rate,
        "adapters": scenario.adapters,
        "tenants": tenants,
        **report.to_dict(),
        "policy": policy,
        "others_ttft_p95": max(
            time_s for tenant, time_s in report.ttft_p95_by_tenant.items() if tenant != FLOODER
        ),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, one row for each scenario and policy; the best kept share among those that attain is bold."""
    lines = [
        "| scenario | tenants | policy | kept | trained tok/s | attained | TTFT p99 "
        "| worst tenant's TTFT p95 | TPOT p99 | gap p99 | fairness: contended, jobs | hit rate | preempted |",
        "| --- | ---: | --- |" + " ---: |" * 10,
    ]
    for row in rows:
        winner = _winner([other for other in rows if other["scenario"] == row["scenario"]])
        kept = f"{row['kept']:.1%}"
        contended = "–" if row["contended_fairness"] is None else f"{row['contended_fairness']:.2f}"
        lines.append(
            f"| {row['scenario']} | {row['tenants']} | {row['policy']} "
            f"| {f'**{kept}**' if row is winner else kept} | {row['trained_per_s']:.0f} "
            f"| {row['attainment']:.1%} | {_ms(row['ttft']['p99'])} | {_ms(row['others_ttft_p95'])} "
            f"| {_ms(row['tpot']['p99'])} "
            f"| {_ms(row['gap']['p99'])} | {contended}, {row['training_fairness']:.2f} "
            f"| {row['adapter_hit_rate']:.1%} | {row['num_preemptions']} |"
        )
    return "\n".join(lines)


def _winner(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    holding = [row for row in rows if row["attainment"] >= SLO.percentile / 100.0]
    return max(holding, key=lambda row: row["kept"], default=None)


def losses(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where another policy that keeps the targets trains more than Weft, or Weft does not keep them."""
    lines = []
    for name in dict.fromkeys(row["scenario"] for row in rows):
        here = [row for row in rows if row["scenario"] == name]
        weft = next(row for row in here if row["policy"] == "Weft")
        best = _winner(here)
        if best is not None and best is not weft:
            lines.append(
                f"- {name}: {best['policy']} keeps {best['kept']:.1%} at {best['attainment']:.1%} attained; "
                f"Weft keeps {weft['kept']:.1%} at {weft['attainment']:.1%}."
            )
    return lines or ["- nowhere in this table."]


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:.0f} ms"


def draw(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Kept share, attainment and tails over the load; hit rate, TTFT and kept share over adapters."""
    panels: tuple[tuple[str, str, Callable[[Mapping[str, Any]], float]], ...] = (
        ("finetuning kept, %", "kept", lambda row: 100 * row["kept"]),
        ("within targets, %", "attained", lambda row: 100 * row["attainment"]),
        ("gaps between\ntokens, p99, ms", "gap", lambda row: 1000 * row["gap"]["p99"]),
        ("first token,\np99, ms", "ttft", lambda row: 1000 * row["ttft"]["p99"]),
    )
    for group, key, label, file in (
        ("load", "rate", "requests a second", "policies-load.png"),
        ("adapters", "adapters", "adapters", "policies-adapters.png"),
    ):
        figure, axes = new_figure(len(panels), [1.6] * len(panels), width=8.0)
        for panel, (name, what, value) in zip(axes, panels, strict=True):
            for policy, color in zip(POLICIES, PALETTE, strict=False):
                points = [row for row in rows if row["group"] == group and row["policy"] == policy]
                x, y = [row[key] for row in points], [value(row) for row in points]
                style = "-" if policy == "Weft" else "--"
                panel.plot(x, y, style, color=color, marker="o", markersize=4, linewidth=1.6, label=policy)
            panel.set_ylabel(name, fontsize=9)
            target = {"gap": SLO.tpot_s, "ttft": SLO.ttft_s, "attained": SLO.percentile / 1000}.get(what)
            if target is not None:
                panel.axhline(1000 * target, color="#333333", linewidth=0.9, linestyle=":")
            panel.set_ylim(0, 1.08 * panel.get_ylim()[1])
        if group == "adapters":
            axes[-1].set_xscale("log")
            counts = sorted({row["adapters"] for row in rows if row["group"] == group})
            axes[-1].set_xticks(counts, [str(count) for count in counts], minor=False)
            axes[-1].minorticks_off()
        axes[-1].set_xlabel(label, fontsize=10)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
        figure.suptitle(f"Policies over {label} (dotted: the target)", fontsize=11)
        save(figure, folder / file)


def commit_now() -> str:
    """The commit that is measured."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


def document(rows: Sequence[Mapping[str, Any]], seconds: float, dedicated: float, commit: str) -> str:
    """The report in Markdown."""
    head = f"""# Policies compared

Simulated: {MODEL} in {QUANTIZATION} on {GPU} (roofline), {seconds:g} s of arrivals, two endless
finetune jobs of two tenants ({dedicated:.0f} tokens/s alone). Targets: {SLO.ttft_s * 1000:g} ms to the first
token and {SLO.tpot_s * 1000:g} ms per token (a request's mean) for {SLO.percentile:g} % of the requests. A
simulation ends with its last request. `kept` is the finetuning rate over that of the same jobs alone under
Weft's policy; `gap` are single gaps between tokens; `contended` is Jain's index of the service of tenants
that had requests waiting; the flooder, who sends in the middle third, does not count as the worst tenant.
Bold: most kept among those that attain.

The static caps are FlexLLM's released scheme with 512 tokens a batch, 256 of finetuning and one layer of
backward an iteration (small), and with 2,048, 1,024 and 4 (large).

    WEFT_TEST_DATA=DATA python benchmarks/policies.py --seconds {seconds:g}

Commit {commit}.

"""
    lost = "\n".join(losses(rows))
    figures = "![over load](policies-load.png)\n\n![over adapters](policies-adapters.png)"
    return f"{head}{table(rows)}\n\n## Where another policy is ahead\n\n{lost}\n\n{figures}\n"


def main() -> int:
    """Run all cells, write all files, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seconds", type=float, default=300.0, help="of arrivals (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--group", choices=("load", "adapters", "tenants", "clients", "flood"), help="only these"
    )
    arguments = parser.parse_args()
    if "WEFT_TEST_DATA" not in os.environ:
        parser.error("WEFT_TEST_DATA must name the folder that holds traces/azure2023 and traces/servegen")
    data = Path(os.environ["WEFT_TEST_DATA"]) / "traces"
    cells = [
        (scenario, policy)
        for scenario in SCENARIOS
        if arguments.group in (None, scenario.group)
        for policy in POLICIES
    ]
    commit = commit_now()
    dedicated = dedicated_rate(setup_for(()))
    with ProcessPoolExecutor(arguments.processes) as pool:
        tasks = [pool.submit(run, *cell, data, arguments.seconds) for cell in cells]
        rows = [task.result() for task in tasks]
    for row in rows:
        row["dedicated_per_s"] = dedicated
        row["kept"] = row["trained_per_s"] / (dedicated or 1.0)
        del row["ttft_p95_by_tenant"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"command": sys.argv, "model": MODEL, "gpu": GPU, "seconds": arguments.seconds, "rows": rows}
    (arguments.out / "policies.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "policies.md").write_text(document(rows, arguments.seconds, dedicated or 0.0, commit))
    if arguments.group is None:
        draw(rows, arguments.out)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
