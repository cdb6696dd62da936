"""`weft bench train`: whole finetuning steps, optimizer included, through the real engine, beside
transformers + PEFT in each of its usual configurations; and the bytes that a finetuning token keeps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from weft_server.adapters.packed import PackedAdapter
from weft_server.adapters.paths import MODULES
from weft_server.bench.harness import BenchEngine, random_tokens
from weft_server.bench.memory import kept_bytes_per_token
from weft_server.bench.peer_steps import PeerTrainer
from weft_server.bench.peers import PEER, PeerFormat, add_adapters, build_peer, why_absent
from weft_server.bench.report import Report
from weft_server.bench.rivals import Measured, Threads, race
from weft_server.bench.settings import Setting, read_setting
from weft_server.bench.stats import Timings, median_ratio
from weft_server.model.activations import LayerActivations
from weft_server.protocol import JobSpec, LoraSpec

GRADIENT_TOLERANCE = {"bfloat16": 0.08, "float32": 1e-3}
"""Of the whole gradient, relative; labels of another example give one that is off by more than its length."""
MAX_KIB_PER_TOKEN = 400.0
_NO_CLIPPING = 1e9
_RANK = 16
_FOREVER = 1_000_000


@dataclass(frozen=True, slots=True)
class Subject:
    """What is trained: examples of one step, and the adapter that it starts from."""

    examples: list[list[int]]
    adapter: PackedAdapter

    @property
    def num_tokens(self) -> int:
        """Tokens of a step."""
        return sum(map(len, self.examples))


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit code."""
    setting = read_setting(arguments)
    num_tokens = 2048 if setting.on_gpu else 512
    positions = setting.model.config.max_position_embeddings
    length = min(num_tokens, positions // 2)
    report = setting.report("train", f"Finetuning steps of {num_tokens} tokens")
    subject = Subject(
        random_tokens(num_tokens // length, length, setting.vocab_size, setting.seed),
        setting.model.adapter(setting.seed, rank=_RANK),
    )
    weft = WeftTrainer(setting, subject)
    try:
        measure_steps(report, setting, weft, subject)
        measure_memory(report, setting, weft, subject)
    finally:
        weft.close()
    report.finish(arguments.out)
    return 0


class WeftTrainer:
    """The engine with a job that never ends, whose first step's gradient is known."""

    def __init__(self, setting: Setting, subject: Subject) -> None:
        weights = setting.model.weft_weights(setting.quantization)
        self._engine = BenchEngine(
            weights,
            max_num_seqs=8,
            cache_tokens=max(4 * subject.num_tokens, 1024),
            # An engine lends finetuning three eighths of its arena.
            arena_bytes=4 * subject.adapter.num_elements * weights.dtype.itemsize,
        )
        spec, adapter = job_spec(len(subject.examples)), self._engine.store(subject.adapter)
        self._engine.start_job("gradient", replace(spec, checkpoint_every=1), subject.examples, adapter)
        self.first_loss = self._engine.train(1)[0].train_loss
        # After one step Adam's first moment is the mean gradient of the step's targets, times 1 - beta1.
        self.gradient: Tensor = self._engine.checkpoint()["m"] / (1 - spec.adam_beta1)
        self._engine.cancel_job("gradient")
        self._engine.start_job("job", spec, subject.examples, adapter)
        self._num_tokens = subject.num_tokens

    def seconds_per_token(self) -> float:
        """One whole step, from the end of the one before."""
        started = time.perf_counter()
        self._engine.train(1)
        return (time.perf_counter() - started) / self._num_tokens

    def close(self) -> None:
        """Stop the engine's threads."""
        self._engine.close()


def job_spec(batch_size: int) -> JobSpec:
    """An endless job with AdamW on all linears, whose gradient is not clipped."""
    return JobSpec(
        seed=0,
        num_epochs=_FOREVER,
        batch_size=batch_size,
        total_steps=_FOREVER,
        learning_rate=1e-5,
        lr_scheduler="constant",
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=_NO_CLIPPING,
        checkpoint_every=_FOREVER,
        lora=LoraSpec(rank=_RANK, alpha=2.0 * _RANK, dropout=0.0, target_modules=MODULES),
    )


def build_trainers(setting: Setting, subject: Subject) -> list[PeerTrainer]:
    """Every usual configuration of the peer: on NF4 and on dense weights where Weft's are NF4, else on dense;
    with and without gradient checkpointing; adapters in fp32 (PEFT's default) and in the base's dtype."""
    formats: tuple[PeerFormat, ...] = ("nf4", "none") if setting.quantization == "nf4" else ("none",)
    dtypes = list(dict.fromkeys((torch.float32, setting.model.dtype)))
    trainers = []
    for quantization in formats:
        peer = build_peer(setting.model, quantization)
        peer = add_adapters(peer, [subject.adapter] * len(dtypes), dtypes)
        trainers += [
            PeerTrainer(peer, idx, quantization, dtype, subject.examples, checkpointing=checkpointing)
            for idx, dtype in enumerate(dtypes)
            for checkpointing in (False, True)
        ]
    return trainers


def check_gradient(
    report: Report, setting: Setting, weft: WeftTrainer, subject: Subject, trainer: PeerTrainer
) -> None:
    """The engine's first gradient, all adapter weights together, against the peer's; and against the peer's
    on the same tokens in another order."""
    expected = trainer.gradient(subject.adapter, subject.examples)
    wrong = trainer.gradient(subject.adapter, [example[::-1] for example in subject.examples])
    dtype = str(setting.model.dtype).removeprefix("torch.")
    report.check(
        f"gradient of the first step against {trainer.name}, relative",
        relative_error(weft.gradient, expected),
        GRADIENT_TOLERANCE[dtype],
        relative_error(weft.gradient, wrong),
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Length of the difference over the length of what is expected."""
    return float((actual - expected).norm() / expected.norm())


def measure_steps(report: Report, setting: Setting, weft: WeftTrainer, subject: Subject) -> None:
    """Tokens a second of Weft and of every configuration of the peer."""
    absent = why_absent(setting.quantization)
    trainers = build_trainers(setting, subject) if absent is None else []
    for trainer in trainers[:1]:
        check_gradient(report, setting, weft, subject, trainer)
    rivals: dict[str, Measured] = {"Weft": weft.seconds_per_token}
    rivals |= {trainer.name: trainer.seconds_per_token for trainer in trainers}
    timings = race(
        setting, Threads(report, setting), rivals, work=f"{subject.num_tokens} tokens", min_rounds=3
    )
    measure = f"finetuning steps of {subject.num_tokens} tokens"
    rate = 1 / median(timings["Weft"])
    for trainer in trainers:
        seconds = timings[trainer.name]
        ratio = median_ratio(seconds, timings["Weft"])
        report.compare(measure, "tokens/s", rate, trainer.name, 1 / median(seconds), ratio)
    if not trainers:
        report.compare(measure, "tokens/s", rate, f"{PEER} ({absent})", None, None)
    add_targets(report, setting, trainers, timings)


def add_targets(report: Report, setting: Setting, trainers: Sequence[PeerTrainer], timings: Timings) -> None:
    """Against the fastest configuration of each kind."""

    def worst(kind: Callable[[PeerTrainer], bool]) -> float | None:
        ratios = [median_ratio(timings[t.name], timings["Weft"]) for t in trainers if kind(t)]
        return min(ratios, default=None)

    if not setting.on_gpu:
        fastest = worst(lambda _trainer: True)
        report.target(f"finetuning against the fastest {PEER}", fastest, at_least=1.4, unit="x")
        return
    checkpointed = worst(lambda t: t.quantization == "nf4" and t.checkpointing)
    report.target(
        f"finetuning against {PEER} on NF4 with checkpointing", checkpointed, at_least=2.0, unit="x"
    )
    dense = worst(lambda t: t.quantization == "none")
    report.target(f"finetuning against the fastest {PEER} on bf16 weights", dense, at_least=1.0, unit="x")


def measure_memory(report: Report, setting: Setting, weft: WeftTrainer, subject: Subject) -> None:
    """What a finetuning token keeps until its backward, its keys and values included."""
    config, dtype = setting.model.config, setting.model.dtype
    kept = kept_bytes_per_token(config, dtype)
    table = report.table("Bytes of a finetuning token", ("part", "KiB"))
    for part, size in kept.items():
        table.add(part, size / 1024)
    table.add("together", sum(kept.values()) / 1024)
    activations = config.num_layers * LayerActivations.bytes_per_row(config, dtype)
    table.add("activations of all layers, where memory allows to keep them", activations / 1024)
    report.data["kept_bytes_per_token"] = kept
    report.data["activation_bytes_per_token"] = activations
    if setting.on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        weft.seconds_per_token()
        peak = torch.cuda.max_memory_allocated() - before
        table.add("peak of a step beyond what is always allocated, a token", peak / subject.num_tokens / 1024)
        report.ceiling(
            "bytes kept for a finetuning token, keys and values included",
            sum(kept.values()) / 1024,
            at_most=MAX_KIB_PER_TOKEN,
            unit=" KiB",
        )
