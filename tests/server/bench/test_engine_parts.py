"""`decode`, `prefill` and `train` from end to end on a tiny shape, and checks that notice wrong answers.

Times are measured here but never judged.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weft_server import cli
from weft_server.bench import rivals, train
from weft_server.bench.answers import peer_generate, peer_logprobs
from weft_server.bench.arguments import add_bench_arguments
from weft_server.bench.decode import check_against_peer
from weft_server.bench.harness import BenchEngine, random_tokens
from weft_server.bench.models import RandomModel
from weft_server.bench.peers import add_adapters, build_peer
from weft_server.bench.report import BenchError, Report
from weft_server.bench.settings import Setting, read_setting
from weft_server.bench.shapes import read_shape

PROMPTS = random_tokens(4, 12, 512, seed=1)
CHOSEN = [0, 1, 0, 1]


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts sweep the number of threads: here over one and the same, as tests share the machine."""
    before = torch.get_num_threads()
    monkeypatch.setattr(rivals, "thread_candidates", lambda _num_cores: [1])
    yield
    torch.set_num_threads(before)


def setting_of(*flags: str) -> Setting:
    parser = argparse.ArgumentParser()
    add_bench_arguments(parser)
    return read_setting(parser.parse_args(["decode", "--model", "tiny", *flags]))


def run_part(part: str, out: Path, *flags: str) -> dict[str, Any]:
    code = cli.main(["bench", part, "--model", "tiny", "--budget-s", "0", "--out", str(out), *flags])
    assert code == 0
    content: dict[str, Any] = json.loads((out / f"{part}-tiny-cpu.json").read_text())
    assert content["checks"]
    assert all(check["passed"] for check in content["checks"])
    return content


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_decode_reports_rates_costs_and_targets(quantization: str, tmp_path: Path) -> None:
    content = run_part("decode", tmp_path, "--quantization", quantization)
    assert content["checks"][0]["error_if_wrong"] > 3 * content["checks"][0]["tolerance"]
    assert [comparison["rival_name"] for comparison in content["comparisons"]] == ["transformers + PEFT"]
    assert content["comparisons"][0]["ratio"] > 0
    assert [target["measured"] is not None for target in content["targets"]] == [True, True]
    titles = [table["title"] for table in content["tables"]]
    assert {"Threads of each rival", "Ceilings measured in this run", "One stream"} <= set(titles)


def test_without_peers_weft_is_measured_by_itself(tmp_path: Path) -> None:
    code = cli.main(
        [
            "bench",
            "prefill",
            "--model",
            "tiny",
            "--budget-s",
            "0",
            "--quantization",
            "int8",
            "--out",
            str(tmp_path),
        ]
    )
    assert code == 0
    content = json.loads((tmp_path / "prefill-tiny-cpu.json").read_text())
    (comparison,) = content["comparisons"]
    assert comparison["weft"] > 0
    assert comparison["rival"] is comparison["ratio"] is None
    assert content["targets"][0]["verdict"] == "not measured"


def test_prefill_reports_rates_costs_and_targets(tmp_path: Path) -> None:
    content = run_part("prefill", tmp_path)
    assert content["comparisons"][0]["ratio"] > 0
    assert len(content["targets"]) == 2


def test_train_compares_with_every_configuration_of_the_peer(tmp_path: Path) -> None:
    content = run_part("train", tmp_path)
    names = [comparison["rival_name"] for comparison in content["comparisons"]]
    assert len(set(names)) == 4
    for words in ("no checkpointing", "float32 adapters", "bfloat16 adapters"):
        assert sum(words in name for name in names) == 2
    fastest = min(comparison["ratio"] for comparison in content["comparisons"])
    assert content["targets"][0]["measured"] == fastest
    assert sum(content["data"]["kept_bytes_per_token"].values()) == 896.0


def test_the_llama_shape_keeps_less_than_400_kib_a_token() -> None:
    kept = train.kept_bytes_per_token(read_shape("llama-3.1-8b").config, torch.bfloat16)
    assert {part: size / 1024 for part, size in kept.items()} == {
        "layer inputs": 256.0,
        "gradient of the hidden state": 8.0,
        "gradients of one layer's keys and values": 8.0,
        "keys and values": 128.0,
    }


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Setting, BenchEngine, list[Any], Any]]:
    """A tiny engine with two adapters, and the peer that has the same."""
    setting = setting_of("--dtype", "float32")
    adapters = [setting.model.adapter(seed) for seed in range(2)]
    engine = BenchEngine(
        setting.model.weft_weights("none"), max_num_seqs=8, cache_tokens=512, arena_bytes=4 << 20
    )
    peer = add_adapters(build_peer(setting.model, "none"), adapters, [torch.float32] * 2)
    yield setting, engine, [engine.store(adapter) for adapter in adapters], peer
    engine.close()


def check(served: tuple[Setting, BenchEngine, list[Any], Any], chosen_by_weft: Sequence[int]) -> Report:
    setting, engine, references, peer = served
    report = Report("decode", "Generation")
    mixed = [references[idx] for idx in chosen_by_weft]
    check_against_peer(report, setting, engine, peer, PROMPTS, CHOSEN, mixed, num_tokens=5)
    return report


def test_the_engine_answers_as_peft_does(served: tuple[Setting, BenchEngine, list[Any], Any]) -> None:
    (passed,) = check(served, CHOSEN).checks
    assert passed.error < 1e-4


def test_an_engine_that_confuses_adapters_is_not_timed(
    served: tuple[Setting, BenchEngine, list[Any], Any],
) -> None:
    with pytest.raises(BenchError, match="Nothing is timed on a wrong result"):
        check(served, [1, 0, 1, 0])


def test_both_generate_the_same_tokens_and_count_them_alike(
    served: tuple[Setting, BenchEngine, list[Any], Any],
) -> None:
    _, engine, references, peer = served
    weft = engine.generate(PROMPTS, [references[idx] for idx in CHOSEN], max_tokens=6, logprobs=True)
    peft = peer_generate(peer, PROMPTS, CHOSEN, max_tokens=6)
    assert weft.tokens == peft.tokens
    assert peft.num_decoded == 4 * 5
    assert 0 < weft.num_decoded <= 4 * 5
    assert weft.first_s > 0
    assert weft.decode_s > 0
    expected = peer_logprobs(peer, PROMPTS, weft.tokens, CHOSEN)
    torch.testing.assert_close(torch.tensor(weft.logprobs), expected, rtol=0, atol=1e-4)


def test_a_wrong_gradient_is_not_timed() -> None:
    setting = setting_of("--dtype", "float32")
    subject = train.Subject(random_tokens(2, 24, 512, seed=2), setting.model.adapter(0))
    weft = train.WeftTrainer(setting, subject)
    try:
        trainer = train.build_trainers(setting, subject)[0]
        report = Report("train", "Steps")
        train.check_gradient(report, setting, weft, subject, trainer)
        assert report.checks[0].error < 1e-4
        assert report.checks[0].error_if_wrong is not None
        assert report.checks[0].error_if_wrong > 1.0
        half: Any = SimpleNamespace(gradient=0.9 * weft.gradient)
        with pytest.raises(BenchError):
            train.check_gradient(report, setting, half, subject, trainer)
    finally:
        weft.close()


def test_on_a_gpu_training_is_held_against_two_kinds_of_peers() -> None:
    model = RandomModel(read_shape("tiny"), dtype=torch.bfloat16, device=torch.device("cuda"))
    setting = Setting(model, "nf4", 1.0, 0)
    trainers: Any = [
        SimpleNamespace(name="nf4 plain", quantization="nf4", checkpointing=False),
        SimpleNamespace(name="nf4 checkpointed", quantization="nf4", checkpointing=True),
        SimpleNamespace(name="bf16", quantization="none", checkpointing=False),
        SimpleNamespace(name="bf16 checkpointed", quantization="none", checkpointing=True),
    ]
    timings = {
        "Weft": [1.0],
        "nf4 plain": [1.2],
        "nf4 checkpointed": [1.9],
        "bf16": [1.1],
        "bf16 checkpointed": [1.5],
    }
    report = Report("train", "Steps")
    train.add_targets(report, setting, trainers, timings)
    assert [(target.measured, target.verdict) for target in report.targets] == [
        (1.9, "no, by 0.1x"),
        (1.1, "yes"),
    ]
    absent = Report("train", "Steps")
    train.add_targets(absent, setting, [], {"Weft": [1.0]})
    assert [target.verdict for target in absent.targets] == ["not measured"] * 2
