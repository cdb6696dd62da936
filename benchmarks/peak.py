"""What the latency budget costs finetuning where nobody generates, and how well iterations are predicted.

    python benchmarks/peak.py [--model demo] [--rounds 6] [--json FILE]

One engine in this process, nothing else on the machine. Finetuning runs by turns under Weft's policy, whose
plans stay short for those who may arrive, and with plans that take all there is: their ratio is the part of
the dedicated peak that is kept. Then it runs beside decodes. Errors are those that the cost model exports:
relative, over its last 256 iterations.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from math import inf
from pathlib import Path
from statistics import median

import numpy as np
import safetensors.numpy
from coserve import hardware

from weft_scheduler.budget import BudgetController
from weft_scheduler.draft import PlanDraft
from weft_scheduler.policies import WeftPolicy
from weft_scheduler.state import SchedulerState
from weft_scheduler.training_policy import plan_training
from weft_server.engine.build import build_engine
from weft_server.engine.config import EngineConfig
from weft_server.engine.engine import Engine
from weft_server.engine.jobs import BlobIO
from weft_server.protocol import Generate, JobFailed, JobProgress, JobSpec, LoraSpec, SamplingParams, StartJob
from weft_server.serving import DEMO_MODEL

BATCH_SIZE = 8
EXAMPLE_TOKENS = 128
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS_PER_ROUND = 8
NUM_DECODES = 4


class Switched:
    """Weft's policy, or all of the ready finetuning work in every plan."""

    def __init__(self) -> None:
        self.is_dedicated = False
        self._weft = WeftPolicy()

    def fill(self, state: SchedulerState, draft: PlanDraft, budget: BudgetController) -> float:
        """See `Policy.fill`."""
        if not self.is_dedicated:
            return self._weft.fill(state, draft, budget)
        plan_training(state, draft, inf, is_due=False)
        return inf


@dataclass(slots=True)
class Result:
    """Finetuning tokens a second (medians of the rounds), their ratio (median of the rounds' ratios), and the
    cost model's errors alone and beside decodes."""

    weft_tokens_per_s: float
    dedicated_tokens_per_s: float
    kept: float
    error_p50_alone: float
    error_p95_alone: float
    error_p50_beside_decodes: float
    error_p95_beside_decodes: float


class Bench:
    """One engine with an endless job."""

    def __init__(self, model: Path) -> None:
        self.blobs: dict[str, bytes] = {}
        self.policy = Switched()
        config = EngineConfig(
            model_dir=str(model),
            model_name="bench",
            epoch=1,
            receive_address="",
            send_address="",
            flight_record="",
            store_url="",
            data_dir="",
            dtype="float32",
        )
        blobs = BlobIO(self.blobs.__getitem__, self._put)
        built = build_engine(config, blobs, policy=self.policy)
        self.engine: Engine = built.engine
        self._vocab_size = built.ready.vocab_size
        self.engine.handle(StartJob("job", "trainer", _spec(), self._put([self._dataset()]), 1))

    def _put(self, chunks: Iterator[bytes] | list[bytes]) -> str:
        name = f"blob-{len(self.blobs)}"
        self.blobs[name] = b"".join(chunks)
        return name

    def _dataset(self) -> bytes:
        rng, num = np.random.default_rng(0), 256
        tokens = rng.integers(0, self._vocab_size, num * EXAMPLE_TOKENS).astype(np.int32)
        return safetensors.numpy.save(
            {
                "tokens": tokens,
                "targets": np.ones(len(tokens), dtype=np.uint8),
                "offsets": np.arange(0, len(tokens) + 1, EXAMPLE_TOKENS, dtype=np.int64),
                "lines": np.arange(1, num + 1, dtype=np.int32),
            }
        )

    def generate(self, num_sequences: int) -> None:
        """Sequences that decode for as long as their context allows."""
        params = SamplingParams(max_tokens=900, temperature=0.0)
        for idx in range(num_sequences):
            self.engine.handle(Generate(f"request-{idx}", "reader", [1, 2, 3, 4 + idx], params))

    def steps_done(self) -> int:
        """One iteration; returns the optimizer steps that it reported."""
        messages = self.engine.step()
        failed = [message for message in messages if isinstance(message, JobFailed)]
        if failed:
            raise SystemExit(f"the job failed: {failed[0].message}")
        return sum(isinstance(message, JobProgress) for message in messages)

    def run_until(self, is_done: Callable[[int], bool]) -> tuple[int, float]:
        """Iterate; returns the steps done and the seconds that they took."""
        started, num_steps = time.perf_counter(), 0
        for _ in count():
            num_steps += self.steps_done()
            if is_done(num_steps):
                return num_steps, time.perf_counter() - started
            if not self.engine.ran:
                time.sleep(0.001)
        raise AssertionError

    def round(self, *, is_dedicated: bool) -> float:
        """Tokens a second over some steps, from one step's end to another's."""
        self.policy.is_dedicated = is_dedicated
        self.run_until(lambda num_steps: num_steps >= 1)
        num_steps, seconds = self.run_until(lambda num_steps: num_steps >= STEPS_PER_ROUND)
        return num_steps * BATCH_SIZE * EXAMPLE_TOKENS / seconds

    def errors(self) -> tuple[float, float]:
        """The exported errors of the cost model, p50 and p95."""
        gauges = self.engine.heartbeat().gauges
        return gauges["cost_model_error_p50"], gauges["cost_model_error_p95"]


def _spec() -> JobSpec:
    lora = LoraSpec(rank=16, alpha=32.0, dropout=0.0, target_modules=MODULES, use_rslora=False)
    return JobSpec(
        seed=0,
        num_epochs=10_000,
        batch_size=BATCH_SIZE,
        total_steps=1_000_000,
        learning_rate=1e-4,
        lr_scheduler="constant",
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        checkpoint_every=1_000_000,
        lora=lora,
    )


def measure(model: Path, num_rounds: int) -> Result:
    """By turns, then beside decodes."""
    bench = Bench(model)
    rates = [(bench.round(is_dedicated=False), bench.round(is_dedicated=True)) for _ in range(num_rounds)]
    bench.policy.is_dedicated = False
    for _ in range(300):
        bench.steps_done()
    alone = bench.errors()
    bench.generate(NUM_DECODES)
    for _ in range(600):
        bench.steps_done()
    beside = bench.errors()
    bench.engine.close()
    weft, dedicated = zip(*rates, strict=True)
    return Result(median(weft), median(dedicated), median(w / d for w, d in rates), *alone, *beside)


def main() -> int:
    """Measure, print, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="a Hugging Face directory, or demo")
    parser.add_argument("--rounds", type=int, default=6, help="pairs of rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    model = DEMO_MODEL if arguments.model == "demo" else Path(arguments.model)
    result = measure(model, arguments.rounds)
    machine = hardware()
    print(" ".join(f"{key}={value}" for key, value in machine.items()))
    print(
        f"finetuning alone: {result.weft_tokens_per_s:.0f} tokens/s in short plans, "
        f"{result.dedicated_tokens_per_s:.0f} in plans without limit: {100 * result.kept:.1f} % kept"
    )
    for name, p50, p95 in (
        ("alone", result.error_p50_alone, result.error_p95_alone),
        ("beside decodes", result.error_p50_beside_decodes, result.error_p95_beside_decodes),
    ):
        print(f"cost model error {name}: {100 * p50:.1f} % (p50), {100 * p95:.1f} % (p95)")
    if arguments.json is not None:
        values = {"command": sys.argv, "hardware": machine, "result": asdict(result)}
        arguments.json.write_text(json.dumps(values, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
