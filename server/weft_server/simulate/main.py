"""Runs `weft simulate`: reads the scenario, simulates, prints, writes and draws."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weft_scheduler.simulator.capacity import Capacity, plan_replicas
from weft_scheduler.simulator.simulation import Result, simulate_with_dedicated
from weft_scheduler.simulator.trace import mean_rate
from weft_server.errors import ConfigError
from weft_server.simulate.scenario import Scenario, read_scenario
from weft_server.simulate.table import capacity_lines, report_lines


def run_simulate(options: argparse.Namespace) -> int:
    """The command; returns its exit code.

    Raises:
        ConfigError: see `read_scenario`; or pictures were asked for and matplotlib is missing, or an output
            cannot be written.
    """
    if options.png is not None:
        from weft_server.simulate.draw import check_matplotlib

        check_matplotlib()
    scenario = read_scenario(options)
    print(_headline(scenario))
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    result = simulate_with_dedicated(scenario.trace, scenario.setup)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    report = result.report
    print("\n".join(report_lines(report, scenario.setup.slo)))
    speed = report.duration_s / max(cpu_s, 1e-9)
    print(
        f"simulated      {report.duration_s:.0f} s, and the jobs alone, in {wall_s:.1f} s "
        f"({cpu_s:.1f} s of one core): {speed:.0f} times real time"
    )
    tried = _plan_gpus(options, scenario, result)
    if options.json is not None:
        _write(options.json, json.dumps(_document(scenario, result, tried, cpu_s), indent=1) + "\n")
    if options.png is not None:
        from weft_server.simulate.draw import draw_all

        for path in draw_all(result, scenario.setup.slo, options.png, title=_title(scenario)):
            print(f"drawn          {path}")
    return 0


def _plan_gpus(options: argparse.Namespace, scenario: Scenario, result: Result) -> list[Capacity]:
    if options.plan_gpus is None:
        return []
    tried = plan_replicas(
        scenario.trace,
        scenario.setup,
        max_replicas=options.plan_gpus,
        dedicated_per_s=result.report.dedicated_per_s,
        duration_s=None,
    )
    print("\n".join(capacity_lines(tried, scenario.setup.slo, options.plan_gpus)))
    return tried


def _headline(scenario: Scenario) -> str:
    trace, setup = scenario.trace, scenario.setup
    num_tenants, num_adapters = len({request.tenant for request in trace}), len(setup.adapter_elements)
    return (
        f"{scenario.model} ({scenario.quantization}) on {scenario.device}, policy {setup.policy}\n"
        f"{len(trace)} requests at {mean_rate(trace):.2f}/s; {num_tenants} tenants, {num_adapters} adapters, "
        f"{len(setup.jobs)} finetune jobs"
    )


def _title(scenario: Scenario) -> str:
    return f"{scenario.model} on {Path(scenario.device).stem}, {scenario.setup.policy}"


def _document(scenario: Scenario, result: Result, tried: list[Capacity], cpu_s: float) -> dict[str, Any]:
    return {
        "command": sys.argv,
        "model": scenario.model,
        "device": scenario.device,
        "quantization": scenario.quantization,
        "slo": asdict(scenario.setup.slo),
        "limits": asdict(scenario.setup.limits),
        "report": result.report.to_dict(),
        "samples": [asdict(sample) for sample in result.samples],
        "gpus": [asdict(item) for item in tried],
        "cpu_s": cpu_s,
    }


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written: {error.strerror or error}") from error
