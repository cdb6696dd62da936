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
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import httpx

from weft_scheduler.simulator.device_model import FittedDevice
from weft_scheduler.simulator.fitted import Fitted, read_fitted
from weft_scheduler.simulator.gpus import GPUS
from weft_scheduler.simulator.jobs import JobSpec
from weft_scheduler.simulator.readers import read_trace
from weft_scheduler.simulator.report import Percentiles
from weft_scheduler.simulator.simulation import Setup, simulate
from weft_scheduler.simulator.trace import Trace, fit_context, scale_lengths
from weft_server import demo
from weft_server.simulate.scenario import read_shape

TRAIN_FILE = Path(demo.__file__).parent / "data" / "ticket-routing.train.jsonl"
BATCH_SIZE = 8
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


@dataclass(slots=True)
class Answer:
    """When the pieces of one answer came, seconds on one clock; `num_pieces` of them."""

    sent_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    num_pieces: int = 0


@contextlib.contextmanager
def served(data_dir: Path, flags: list[str]) -> Iterator[str]:
    """A server with this data folder; yields its address, and has stopped in good order afterwards."""
    command = [sys.executable, "-m", "weft_server.cli", "serve", "demo", "--port", "0"]
    command += ["--data-dir", str(data_dir), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith("Weft is ready: "):
            raise SystemExit(f"the server did not start: {line.strip()} (status {process.poll()})")
        yield line.removeprefix("Weft is ready: ").strip()
    finally:
        process.terminate()
        process.wait()


async def ask(client: httpx.AsyncClient, model: str, num_prompt: int, num_output: int) -> Answer:
    """One streamed completion of exactly `num_output` tokens."""
    body = {
        "model": model,
        "prompt": [100 + idx % 900 for idx in range(num_prompt)],
        "max_tokens": num_output,
        "ignore_eos": True,
        "stream": True,
    }
    answer = Answer(time.perf_counter())
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                answer.last_s = time.perf_counter()
                answer.first_s = answer.first_s or answer.last_s
                answer.num_pieces += 1
    return answer


async def counts(client: httpx.AsyncClient) -> tuple[float, float]:
    """Tokens forwarded for finetuning, and optimizer steps, so far."""
    text = (await client.get("/metrics")).text

    def total(name: str) -> float:
        return sum(float(v) for v in re.findall(rf"^weft_{name}_total(?:{{[^}}]*}})? (\S+)$", text, re.M))

    return total("finetune_forward_tokens"), total("finetune_steps")


async def start_job(client: httpx.AsyncClient, model: str) -> None:
    """A job that outlasts the run, running."""
    with TRAIN_FILE.open("rb") as data:
        upload = await client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": data})
    upload.raise_for_status()
    body = {
        "model": model,
        "training_file": upload.json()["id"],
        "hyperparameters": {"n_epochs": 50, "batch_size": BATCH_SIZE},
    }
    job = await client.post("/v1/fine_tuning/jobs", json=body)
    job.raise_for_status()
    while (await client.get(f"/v1/fine_tuning/jobs/{job.json()['id']}")).json()["status"] != "running":
        await asyncio.sleep(0.1)


async def replay(url: str, trace: Trace) -> tuple[Measured, int]:
    """Send the trace at its times; returns what was measured and the mean tokens of a training example."""
    async with httpx.AsyncClient(base_url=url, timeout=300.0) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        await start_job(client, model)
        await asyncio.sleep(WARM_UP_S)
        tokens_before, steps_before = await counts(client)
        began = time.perf_counter()

        async def at_its_time(arrival_s: float, num_prompt: int, num_output: int) -> Answer:
            await asyncio.sleep(began + arrival_s - time.perf_counter())
            return await ask(client, model, num_prompt, num_output)

        answers = await asyncio.gather(
            *(at_its_time(r.arrival_s, r.num_prompt_tokens, r.num_output_tokens) for r in trace)
        )
        elapsed_s = time.perf_counter() - began
        tokens_after, steps_after = await counts(client)
    trained = tokens_after - tokens_before
    example_tokens = round(trained / max(1.0, (steps_after - steps_before) * BATCH_SIZE))
    return _measured(answers, trace, trained / elapsed_s), max(1, example_tokens)


def _measured(answers: list[Answer], trace: Trace, trained_per_s: float) -> Measured:
    tpot = [
        (answer.last_s - answer.first_s) / (request.num_output_tokens - 1)
        for answer, request in zip(answers, trace, strict=True)
        if request.num_output_tokens > 1
    ]
    ttft = [answer.first_s - answer.sent_s for answer in answers]
    return _as_measured(Percentiles.of(tpot), Percentiles.of(ttft), trained_per_s)


def _as_measured(tpot: Percentiles, ttft: Percentiles, trained_per_s: float) -> Measured:
    return Measured(tpot.p50 or 0.0, tpot.p95 or 0.0, ttft.p50 or 0.0, ttft.p95 or 0.0, trained_per_s)


def simulated(trace: Trace, fitted: Fitted, example_tokens: int) -> Measured:
    """The same arrivals and a job of such examples, on the fitted cost model."""
    job = JobSpec("job-0", "default", batch_size=BATCH_SIZE, example_tokens=example_tokens)
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
        with served(Path(folder), arguments.server_flags) as url:
            real, example_tokens = asyncio.run(replay(url, trace))
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
