"""Generation alone, finetuning alone, and both at once, on one `weft serve`, measured from outside over HTTP.

    python benchmarks/coserve.py [--model demo] [--streams 2] [--jobs 2] [--json FILE] [-- --tpot-slo-ms 40 …]

Starts its own server, so nothing else should run on the machine. Per-token latencies are gaps between the
pieces of streamed answers as a client sees them, over the tokens of a piece (a token that shows no text comes
with the next); token counts are the server's own (`/metrics`). Finetuning runs on the bundled ticket-routing
examples and is cancelled at the end of each window.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles

import httpx
import torch

from weft_server import demo

TRAIN_FILE = Path(demo.__file__).parent / "data" / "ticket-routing.train.jsonl"
PROMPTS = (
    "What is the capital of France?",
    "Tell me about the sea.",
    "How do I reset my password?",
    "Where do bears sleep in winter?",
)
WARM_UP_S = 3.0


@dataclass(slots=True)
class Window:
    """One phase's measurement: counts a second, and per-token latencies in milliseconds."""

    phase: str
    seconds: float = 0.0
    generated_per_s: float = 0.0
    trained_per_s: float = 0.0
    tpot_p50_ms: float | None = None
    tpot_p95_ms: float | None = None
    tpot_p99_ms: float | None = None


class Load:
    """Streams that never stop, and jobs that outlast the window."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model
        self.gaps_s: list[float] | None = None

    async def generate_forever(self, idx: int) -> None:
        """One reader: answer after answer."""
        for turn in itertools.count(idx):
            body = {
                "model": self._model,
                "prompt": PROMPTS[turn % len(PROMPTS)],
                "max_tokens": 128,
                "ignore_eos": True,
                "logprobs": 0,
                "stream": True,
            }
            last: float | None = None
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.is_error:
                    raise RuntimeError((await response.aread()).decode())
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    now = time.perf_counter()
                    choices = json.loads(line.removeprefix("data: "))["choices"]
                    num_tokens = len((choices[0].get("logprobs") or {}).get("tokens", ())) if choices else 0
                    if not num_tokens:
                        continue
                    if last is not None and self.gaps_s is not None:
                        self.gaps_s += [(now - last) / num_tokens] * num_tokens
                    last = now

    async def submit(self, num_jobs: int, file_id: str) -> list[str]:
        """Start jobs with far more steps than a window has time for."""
        jobs = []
        for idx in range(num_jobs):
            answer = await self._client.post(
                "/v1/fine_tuning/jobs",
                json={
                    "model": self._model,
                    "training_file": file_id,
                    "seed": idx,
                    "hyperparameters": {"n_epochs": 50, "batch_size": 8},
                    "weft": {"learning_rate": 1e-4},
                },
            )
            answer.raise_for_status()
            jobs.append(answer.json()["id"])
        while True:
            states = [(await self._client.get(f"/v1/fine_tuning/jobs/{job}")).json() for job in jobs]
            if all(state["status"] == "running" for state in states):
                return jobs
            if any(state["status"] in ("failed", "cancelled") for state in states):
                raise RuntimeError(f"a job failed: {[state['error'] for state in states]}")
            await asyncio.sleep(0.1)

    async def counts(self) -> tuple[float, float]:
        """Generated tokens and tokens forwarded for finetuning, so far."""
        text = (await self._client.get("/metrics")).text

        def total(name: str) -> float:
            return sum(float(v) for v in re.findall(rf"^weft_{name}_total(?:{{[^}}]*}})? (\S+)$", text, re.M))

        return total("generation_tokens"), total("finetune_forward_tokens")


async def measure(load: Load, phase: str, num_streams: int, seconds: float) -> Window:
    """Run one phase: warm up, then count for `seconds`."""
    async with reading(load, num_streams) as readers:
        await asyncio.sleep(WARM_UP_S)
        gaps = load.gaps_s = []
        started, (generated, trained) = time.perf_counter(), await load.counts()
        await _sleep_beside(readers, seconds)
        elapsed, (generated_now, trained_now) = time.perf_counter() - started, await load.counts()
        load.gaps_s = None
    window = Window(phase, elapsed, (generated_now - generated) / elapsed, (trained_now - trained) / elapsed)
    if len(gaps) > 1:
        cuts = quantiles(gaps, n=100, method="inclusive")
        window.tpot_p50_ms, window.tpot_p95_ms, window.tpot_p99_ms = (1000 * cuts[i] for i in (49, 94, 98))
    return window


@contextlib.asynccontextmanager
async def reading(load: Load, num_streams: int) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Readers that run inside the context."""
    readers = [asyncio.create_task(load.generate_forever(i)) for i in range(num_streams)]
    try:
        yield readers
    finally:
        for task in readers:
            task.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _sleep_beside(readers: list[asyncio.Task[None]], seconds: float) -> None:
    """Sleep; a reader that fails ends the measurement."""
    sleep = asyncio.create_task(asyncio.sleep(seconds))
    done, _ = await asyncio.wait([sleep, *readers], return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


@contextlib.contextmanager
def served(arguments: argparse.Namespace) -> Iterator[str]:
    """A server of its own on a free port, with an empty data directory; yields its address."""
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as data_dir:
        command = [sys.executable, "-m", "weft_server.cli", "serve", arguments.model, "--port", "0"]
        command += ["--data-dir", data_dir, *arguments.server_flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line.startswith("Weft is ready: "):
                raise SystemExit(f"the server did not start: {line.strip()} (status {process.poll()})")
            yield line.removeprefix("Weft is ready: ").strip()
        finally:
            process.terminate()
            process.wait()


async def run(url: str, arguments: argparse.Namespace) -> list[Window]:
    """The three phases."""
    async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        load = Load(client, model)
        with TRAIN_FILE.open("rb") as data:
            upload = await client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": data})
        upload.raise_for_status()
        windows = [await measure(load, "generation alone", arguments.streams, arguments.seconds)]
        jobs = await load.submit(arguments.jobs, upload.json()["id"])
        windows.append(await measure(load, "finetuning alone", 0, arguments.seconds))
        windows.append(await measure(load, "both", arguments.streams, arguments.seconds))
        for job in jobs:
            await client.post(f"/v1/fine_tuning/jobs/{job}/cancel")
        return windows


def hardware() -> dict[str, str | int]:
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": cpu[1].strip() if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
    }


def _table(windows: list[Window]) -> str:
    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.1f}"

    rows = [
        "| phase | p50 ms/token | p95 | p99 | generated tok/s | trained tok/s |",
        "| --- |" + " ---: |" * 5,
    ]
    for w in windows:
        numbers = (w.tpot_p50_ms, w.tpot_p95_ms, w.tpot_p99_ms)
        rates = f"{w.generated_per_s:.0f} | {w.trained_per_s:.0f}"
        rows.append(f"| {w.phase} | {' | '.join(map(cell, numbers))} | {rates} |")
    return "\n".join(rows)


def main() -> int:
    """Measure, print, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="what `weft serve` is given (default: %(default)s)")
    parser.add_argument(
        "--streams", type=int, default=2, help="answers read at a time (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="finetune jobs (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="length of a phase (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("server_flags", nargs="*", help="after `--`: flags of `weft serve`")
    arguments = parser.parse_args()
    with served(arguments) as url:
        windows = asyncio.run(run(url, arguments))
    machine = hardware()
    print(" ".join(f"{key}={value}" for key, value in machine.items()))
    print(_table(windows))
    if arguments.json is not None:
        result = {"command": sys.argv, "hardware": machine, "windows": [asdict(w) for w in windows]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
