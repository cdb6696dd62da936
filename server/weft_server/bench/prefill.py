"""`weft bench prefill`: prompts with several adapters, through the real engine, beside transformers + PEFT;
and what distinct adapters add to a prefill."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median

from weft_server.bench.answers import peer_prefill
from weft_server.bench.decode import add_rates, check_against_peer
from weft_server.bench.harness import BenchEngine, random_tokens
from weft_server.bench.peers import PEER, add_adapters, build_peer, why_absent
from weft_server.bench.report import Report
from weft_server.bench.rivals import Threads, race, take_turns
from weft_server.bench.settings import Setting, read_setting
from weft_server.bench.stats import median_ratio
from weft_server.protocol import AdapterRef

NUM_REQUESTS, NUM_MIXED_ADAPTERS = 8, 4
NUM_TOKENS = 512
"""Of all prompts together."""


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit code."""
    setting = read_setting(arguments)
    report = setting.report("prefill", f"Prompts of {NUM_TOKENS} tokens together")
    weights = setting.model.weft_weights(setting.quantization)
    adapters = [setting.model.adapter(seed) for seed in range(NUM_REQUESTS)]
    engine = BenchEngine(
        weights,
        max_num_seqs=NUM_REQUESTS,
        cache_tokens=4 * NUM_TOKENS,
        arena_bytes=3 * sum(adapter.num_elements for adapter in adapters) * weights.dtype.itemsize,
    )
    try:
        references = [engine.store(adapter) for adapter in adapters]
        threads = Threads(report, setting)
        prompts = random_tokens(NUM_REQUESTS, NUM_TOKENS // NUM_REQUESTS, setting.vocab_size, setting.seed)
        chosen = [idx % NUM_MIXED_ADAPTERS for idx in range(NUM_REQUESTS)]
        mixed = [references[idx] for idx in chosen]
        absent = why_absent(setting.quantization)
        rivals = {"Weft": lambda: first_tokens(engine, prompts, mixed) / NUM_TOKENS}
        if absent is None:
            peer = build_peer(setting.model, "nf4" if setting.quantization == "nf4" else "none")
            peer = add_adapters(
                peer, adapters[:NUM_MIXED_ADAPTERS], [setting.model.dtype] * NUM_MIXED_ADAPTERS
            )
            check_against_peer(report, setting, engine, peer, prompts, chosen, mixed, num_tokens=4)
            rivals[PEER] = lambda: peer_prefill(peer, prompts, chosen) / NUM_TOKENS
        timings = race(setting, threads, rivals, work="prefill")
        measure = f"prefill of {NUM_REQUESTS} prompts over {NUM_MIXED_ADAPTERS} adapters, {NUM_TOKENS} tokens"
        ratio = add_rates(report, measure, timings, absent)
        if not setting.on_gpu:
            text = f"prefill of mixed adapters, {NUM_TOKENS} tokens, against {PEER}"
            report.target(text, ratio, at_least=1.6, unit="x")
        measure_adapter_cost(report, setting, threads, engine, prompts, references)
    finally:
        engine.close()
    report.finish(arguments.out)
    return 0


def first_tokens(
    engine: BenchEngine, prompts: Sequence[Sequence[int]], adapters: Sequence[AdapterRef | None]
) -> float:
    """Seconds until every request has its first token."""
    return engine.generate(prompts, adapters, max_tokens=1).first_s


def measure_adapter_cost(
    report: Report,
    setting: Setting,
    threads: Threads,
    engine: BenchEngine,
    prompts: Sequence[Sequence[int]],
    references: Sequence[AdapterRef],
) -> None:
    """The same prompts with an adapter each and without any."""
    calls = {
        "without": lambda: first_tokens(engine, prompts, [None] * len(prompts)),
        "with": lambda: first_tokens(engine, prompts, references),
    }
    timings = take_turns(
        setting, {name: threads.under("Weft, prefill", call) for name, call in calls.items()}, min_rounds=5
    )
    added = 100 * (median_ratio(timings["with"], timings["without"]) - 1)
    table = report.table(
        f"{len(references)} distinct rank-16 adapters on all linears, {NUM_TOKENS} tokens",
        ("without adapters, ms", "with, ms", "added, %"),
    )
    table.add(1000 * median(timings["without"]), 1000 * median(timings["with"]), added)
    report.ceiling(
        f"{NUM_TOKENS}-token prefill: added by {len(references)} distinct rank-16 adapters",
        added,
        at_most=10,
        unit=" %",
    )
