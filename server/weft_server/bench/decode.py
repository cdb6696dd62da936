"""`weft bench decode`: generation with several adapters, through the real engine, beside transformers + PEFT.

How many tokens a second for requests that mix adapters; what distinct adapters add to an iteration, against
the time of their bytes; what share of the bandwidth roofline one stream reaches; and, on a GPU, what captured
graphs save.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from weft_server.adapters.packed import PackedAdapter
from weft_server.bench.answers import answer_error, peer_generate, peer_logprobs
from weft_server.bench.ceilings import Ceilings
from weft_server.bench.harness import BenchEngine, random_tokens
from weft_server.bench.peers import PEER, PeerModel, add_adapters, build_peer, why_absent
from weft_server.bench.report import Report
from weft_server.bench.rivals import Threads, race, take_turns
from weft_server.bench.settings import Setting, add_ceilings, measure_ceilings, read_setting
from weft_server.bench.stats import Timings, median_ratio
from weft_server.cache.kv import KvCache
from weft_server.protocol import AdapterRef

NUM_REQUESTS, NUM_MIXED_ADAPTERS = 8, 4
LOGPROB_TOLERANCE = {"bfloat16": 0.05, "float32": 0.01}
"""Of log-probabilities, root mean square; another adapter's answer differs by several tenths."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens of a prompt and of an answer; how many distinct adapters meet in the batch that prices them."""

    prompt: int
    answer: int
    num_distinct: int


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit code."""
    setting = read_setting(arguments)
    sizes = Sizes(512, 65, 32) if setting.on_gpu else Sizes(32, 25, 8)
    report = setting.report("decode", "Generation with adapters")
    weights = setting.model.weft_weights(setting.quantization)
    # Before an engine is built over them: it may lay weights out once more, for its backward passes.
    weight_bytes = sum(layer.num_bytes for layer in weights.layers) + weights.lm_head.nbytes
    adapters = [setting.model.adapter(seed) for seed in range(sizes.num_distinct)]
    build_engine = partial(
        BenchEngine,
        weights,
        max_num_seqs=max(NUM_REQUESTS, sizes.num_distinct),
        cache_tokens=2 * sizes.num_distinct * (sizes.prompt + sizes.answer + 16),
        # An engine lends requests half of its arena.
        arena_bytes=3 * sum(adapter.num_elements for adapter in adapters) * weights.dtype.itemsize,
    )
    engine = build_engine()
    try:
        references = [engine.store(adapter) for adapter in adapters]
        threads = Threads(report, setting)
        ceilings = measure_ceilings(setting)
        add_ceilings(report, ceilings)
        measure_mixed(report, setting, threads, engine, adapters, references, sizes)
        measure_adapter_cost(report, setting, threads, engine, adapters, references, sizes, ceilings)
        measure_single_stream(report, setting, threads, engine, weight_bytes, sizes, ceilings)
        if setting.on_gpu:
            measure_graphs(report, setting, threads, engine, build_engine, adapters, sizes)
    finally:
        engine.close()
    report.finish(arguments.out)
    return 0


def measure_mixed(
    report: Report,
    setting: Setting,
    threads: Threads,
    engine: BenchEngine,
    adapters: Sequence[PackedAdapter],
    references: Sequence[AdapterRef],
    sizes: Sizes,
) -> None:
    """Tokens a second of 8 requests over 4 adapters."""
    prompts = random_tokens(NUM_REQUESTS, sizes.prompt, setting.vocab_size, setting.seed)
    chosen = [idx % NUM_MIXED_ADAPTERS for idx in range(NUM_REQUESTS)]
    mixed = [references[idx] for idx in chosen]

    def weft() -> float:
        answer = engine.generate(prompts, mixed, max_tokens=sizes.answer)
        return answer.decode_s / answer.num_decoded

    absent = why_absent(setting.quantization)
    calls = {"Weft": weft}
    if absent is None:
        peer = build_peer(setting.model, "nf4" if setting.quantization == "nf4" else "none")
        peer = add_adapters(peer, adapters[:NUM_MIXED_ADAPTERS], [setting.model.dtype] * NUM_MIXED_ADAPTERS)
        check_against_peer(report, setting, engine, peer, prompts, chosen, mixed, num_tokens=8)

        def peft() -> float:
            answer = peer_generate(peer, prompts, chosen, max_tokens=sizes.answer)
            return answer.decode_s / answer.num_decoded

        calls[PEER] = peft
    timings = race(setting, threads, calls, work="decode")
    measure = f"decode of {NUM_REQUESTS} requests over {NUM_MIXED_ADAPTERS} adapters"
    ratio = add_rates(report, measure, timings, absent)
    if not setting.on_gpu:
        report.target(
            "decode, 8 requests over 4 adapters, against transformers + PEFT", ratio, at_least=1.4, unit="x"
        )


def check_against_peer(
    report: Report,
    setting: Setting,
    engine: BenchEngine,
    peer: PeerModel,
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[int],
    mixed: Sequence[AdapterRef],
    *,
    num_tokens: int,
) -> None:
    """The engine's own answers and their log-probabilities, against PEFT's of the same tokens; and against
    PEFT's with every row's adapter exchanged for another."""
    answer = engine.generate(prompts, mixed, max_tokens=num_tokens, logprobs=True)
    expected = peer_logprobs(peer, prompts, answer.tokens, chosen)
    others = [(idx + 1) % (max(chosen) + 1) for idx in chosen]
    wrong = peer_logprobs(peer, prompts, answer.tokens, others)
    dtype = str(setting.model.dtype).removeprefix("torch.")
    report.check(
        f"log-probabilities of the engine's answers against {PEER}'s, rms",
        answer_error(answer, expected),
        LOGPROB_TOLERANCE[dtype],
        answer_error(answer, wrong),
    )


def measure_adapter_cost(
    report: Report,
    setting: Setting,
    threads: Threads,
    engine: BenchEngine,
    adapters: Sequence[PackedAdapter],
    references: Sequence[AdapterRef],
    sizes: Sizes,
    ceilings: Ceilings,
) -> None:
    """What one adapter for each row adds to an iteration without any, against the time its bytes take."""
    num = sizes.num_distinct
    prompts = random_tokens(num, sizes.prompt, setting.vocab_size, setting.seed + 1)
    num_bytes = sum(adapter.num_parameters for adapter in adapters) * setting.model.dtype.itemsize

    def iterations(chosen: Sequence[AdapterRef | None]) -> float:
        answer = engine.generate(prompts, chosen, max_tokens=sizes.answer)
        return answer.decode_s / (answer.num_decoded / num)

    calls = {"without": lambda: iterations([None] * num), "with": lambda: iterations(references)}
    timings = take_turns(
        setting, {name: threads.under("Weft, decode", call) for name, call in calls.items()}, min_rounds=5
    )
    without_ms = 1000 * median(timings["without"])
    added_ms = 1000 * median(w - wo for w, wo in zip(timings["with"], timings["without"], strict=True))
    bytes_ms = 1000 * num_bytes / ceilings.read_bytes_per_s
    extra_ms = 0.3 if setting.on_gpu else 0.1 * without_ms
    table = report.table(
        f"{num} distinct rank-16 adapters on all linears, one a row",
        (
            "without adapters, ms/iteration",
            "adapters add, ms",
            "MB of adapters",
            "time of their bytes, ms",
            "limit, ms",
        ),
    )
    limit_ms = 1.5 * bytes_ms + extra_ms
    table.add(without_ms, added_ms, num_bytes / 1e6, bytes_ms, limit_ms)
    extra = "0.3 ms" if setting.on_gpu else "10 % of the iteration without them"
    report.ceiling(
        f"decode batch of {num}: added by {num} rank-16 adapters (limit: 1.5 × their bytes' time + {extra})",
        added_ms,
        at_most=limit_ms,
        unit=" ms",
    )


def measure_single_stream(
    report: Report,
    setting: Setting,
    threads: Threads,
    engine: BenchEngine,
    weight_bytes: int,
    sizes: Sizes,
    ceilings: Ceilings,
) -> None:
    """One request without an adapter, against reading weights, head and its keys and values once a token."""
    config, dtype = setting.model.config, setting.model.dtype
    prompts = random_tokens(1, sizes.prompt, setting.vocab_size, setting.seed + 2)
    kv_bytes = KvCache.bytes_per_token(
        num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=dtype
    ) * (sizes.prompt + sizes.answer // 2)
    read = weight_bytes + kv_bytes

    def token() -> float:
        answer = engine.generate(prompts, [None], max_tokens=sizes.answer)
        return answer.decode_s / answer.num_decoded

    seconds = median(race(setting, threads, {"Weft": token}, work="one stream")["Weft"])
    share = read / ceilings.read_bytes_per_s / seconds
    table = report.table(
        "One stream", ("tokens/s", "ms/token", "MB read a token", "share of bandwidth roofline, %")
    )
    table.add(1 / seconds, 1000 * seconds, read / 1e6, 100 * share)
    if setting.on_gpu:
        report.target(
            "single-stream decode, share of the bandwidth roofline, head included",
            100 * share,
            at_least=40,
            unit=" %",
        )


def measure_graphs(
    report: Report,
    setting: Setting,
    threads: Threads,
    engine: BenchEngine,
    build_engine: Callable[..., BenchEngine],
    adapters: Sequence[PackedAdapter],
    sizes: Sizes,
) -> None:
    """Decode iterations of the same requests with captured graphs, and with kernels launched one by one."""
    prompts = random_tokens(NUM_REQUESTS, sizes.prompt, setting.vocab_size, setting.seed + 3)
    eager = build_engine(enforce_eager=True)
    try:
        calls = {}
        for name, one in (("graphs", engine), ("eager", eager)):
            chosen = [one.store(adapters[idx % NUM_MIXED_ADAPTERS]) for idx in range(NUM_REQUESTS)]

            def iteration(one: BenchEngine = one, chosen: Sequence[AdapterRef] = chosen) -> float:
                answer = one.generate(prompts, chosen, max_tokens=sizes.answer)
                return answer.decode_s / (answer.num_decoded / NUM_REQUESTS)

            calls[name] = threads.under("Weft, decode", iteration)
        timings = take_turns(setting, calls, min_rounds=5)
    finally:
        eager.close()
    table = report.table(
        f"{NUM_REQUESTS} requests over {NUM_MIXED_ADAPTERS} adapters, ms/iteration",
        ("CUDA graphs", "launched one by one"),
    )
    table.add(1000 * median(timings["graphs"]), 1000 * median(timings["eager"]))


def add_rates(report: Report, measure: str, timings: Timings, absent: str | None) -> float | None:
    """Tokens a second of Weft and, where it could be measured, of the peer, from seconds a token; returns how
    many times as many Weft's are (median of the rounds)."""
    weft, peer = timings["Weft"], timings.get(PEER)
    ratio = None if peer is None else median_ratio(peer, weft)
    rival = PEER if absent is None else f"{PEER} ({absent})"
    report.compare(
        measure, "tokens/s", 1 / median(weft), rival, None if peer is None else 1 / median(peer), ratio
    )
    return ratio
