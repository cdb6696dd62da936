"""The simulator against the engine: one real run on this machine's CPU, and the same arrivals simulated.

    WEFT_TEST_DATA=DATA python benchmarks/validate_simulator.py [--seconds 60] [--rate 1.0] [--json FILE]
        [-- --dtype float32 …]

Starts `weft serve demo`, sends the requests of Azure's trace (slower and shorter) at their times over HTTP
while one finetune job runs, stops the server, and simulates the same arrivals on the cost model that the
server leaves behind. Latencies are a client's; finetuning tokens are the server's own count. Nothing else
should run on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from weft_scheduler.simulator.device_model import FittedDevice
from weft_scheduler.simulator.fitted import Fitted, read_fitted
from weft_scheduler.simulator.gpus import GPUS
from weft_scheduler.simulator.jobs import JobSpec
from weft_scheduler.simulator.readers import read_trace
from weft_scheduler.simulator.report import Percentiles
from weft_scheduler.simulator.simulation import Setup, simulate
from weft_scheduler.simulator.trace import Trace, fit_context, scale_lengths
from weft_server.bench.serve.client import Client
from weft_server.bench.serve.load import Run, send_all
from weft_server.bench.serve.measures import Latencies
from weft_server.bench.serve.server import served
from weft_server.bench.serve.tenants import JOB_BATCH_SIZE, Account
from weft_server.bench.serve.workload import LoadRequest, make_requests
from weft_server.simulate.scenario import read_shape

WARM_UP_S = 5.0
QUIET_S, AZURE_RATE = 60.0, 5.53
"""The first minute of the trace is quieter than the rest, and left out."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One side: percentiles of the requests' mean seconds per token and to the first, and finetuning."""

    tpot_p50_s: float
    tpot_p95_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    trained_per_s: float


def replay(url: str, trace: Trace) -> tuple[Measured, int]:
    """Send the trace at its times; returns what was measured and the mean tokens of a training example."""
    account = Account(url, None)
    model = account.ready()["model"]
    requests = make_requests(trace, models=[[]], base_model=model, seed=0, extra={})
    account.start_jobs(model, 1)
    time.sleep(WARM_UP_S)
    tokens_before, steps_before = account.trained_tokens() or 0.0, account.finetune_steps() or 0.0
    run = asyncio.run(send(url, requests))
    trained = (account.trained_tokens() or 0.0) - tokens_before
    num_steps = (account.finetune_steps() or 0.0) - steps_before
    account.close()
    elapsed_s = max(item.reply.ended_s for item in run.sent) - run.began_s
    example_tokens = round(trained / max(1.0, num_steps * JOB_BATCH_SIZE))
    return _measured(run, trained / elapsed_s), max(1, example_tokens)


async def send(url: str, requests: Sequence[LoadRequest]) -> Run:
    """The requests at their times, on one client."""
    client = Client(url, timeout_s=300.0)
    try:
        return await send_all(client, requests, [None], 0.0)
    finally:
        await client.close()


def _measured(run: Run, trained_per_s: float) -> Measured:
    found = []
    for item in run.sent:
        latencies = Latencies.of(item)
        if latencies is None:
            raise SystemExit(f"a request failed: {item.reply.error}")
        found.append((item.request.num_output_tokens, latencies))
    tpot = [latencies.tpot_ms / 1000 for num_tokens, latencies in found if num_tokens > 1]
    ttft = [latencies.ttft_ms / 1000 for _, latencies in found]
    return _as_measured(Percentiles.of(tpot), Percentiles.of(ttft), trained_per_s)


def _as_measured(tpot: Percentiles, ttft: Percentiles, trained_per_s: float) -> Measured:
    return Measured(tpot.p50 or 0.0, tpot.p95 or 0.0, ttft.p50 or 0.0, ttft.p95 or 0.0, trained_per_s)


def simulated(trace: Trace, fitted: Fitted, example_tokens: int) -> Measured:
    """The same arrivals and a job of such examples, on the fitted cost model."""
    job = JobSpec("job-0", "default", batch_size=JOB_BATCH_SIZE, example_tokens=example_tokens)
    setup = Setup(
        limits=fitted.limits,
        device=FittedDevice(fitted.cost),
        gpu=GPUS["cpu"],
        slo=fitted.slo,
        jobs=(job,),
        job_elements={job.job_id: read_shape("demo").adapter_elements(job.rank)},
        noise=fitted.noise,
        max_pack_tokens=fitted.max_pack_tokens,
    )
    later = tuple(replace(request, arrival_s=request.arrival_s + WARM_UP_S) for request in trace)
    report = simulate(later, setup).report
    return _as_measured(report.tpot, report.ttft, report.trained_per_s)


def table(real: Measured, model: Measured) -> str:
    """Both sides and the relative error, in Markdown."""
    lines = ["| measure | real | simulated | error |", "| --- | ---: | ---: | ---: |"]
    for name, value in asdict(real).items():
        guess = asdict(model)[name]
        scale, unit = (1000.0, "ms") if name.endswith("_s") and "per_s" not in name else (1.0, "tokens/s")
        error = f"{(guess - value) / value:+.1%}" if value else "–"
        label = name.removesuffix("_s").replace("_", " ") if unit == "ms" else "finetuning"
        lines.append(f"| {label} | {value * scale:.1f} {unit} | {guess * scale:.1f} {unit} | {error} |")
    return "\n".join(lines)


def main() -> int:
    """Run, simulate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second (default: %(default)s)")
    parser.add_argument("--length-scale", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("server_flags", nargs="*", help="after `--`: flags of `weft serve`")
    arguments = parser.parse_args()
    if "WEFT_TEST_DATA" not in os.environ:
        parser.error("WEFT_TEST_DATA must name the folder that holds traces/azure2023")
    path = Path(os.environ["WEFT_TEST_DATA"]) / "traces" / "azure2023" / "AzureLLMInferenceTrace_conv.csv.gz"
    start_s = QUIET_S * AZURE_RATE / arguments.rate
    trace = read_trace(
        str(path), start_s=start_s, duration_s=arguments.seconds, requests_per_s=arguments.rate
    )
    trace = fit_context(scale_lengths(trace, arguments.length_scale), read_shape("demo").max_model_len)
    with tempfile.TemporaryDirectory(prefix="weft-validate-") as folder:
        with served("demo", Path(folder), arguments.server_flags) as url:
            real, example_tokens = replay(url, trace)
        fitted = read_fitted((Path(folder) / "cost_model.json").read_text())
    model = simulated(trace, fitted, example_tokens)
    print(f"{len(trace)} requests, examples of {example_tokens} tokens, noise {fitted.noise:.1%}")
    print(table(real, model))
    if arguments.json is not None:
        result = {"command": sys.argv, "real": asdict(real), "simulated": asdict(model)}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
