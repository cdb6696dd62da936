"""`weft simulate` from the command line: its table, its files, its figures, its refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from weft_scheduler import CostModel, LatencyTargets, Scheduler
from weft_scheduler.policies import POLICIES
from weft_scheduler.simulator.device_model import Roofline, calibration_samples
from weft_scheduler.simulator.fitted import describe
from weft_scheduler.simulator.gpus import GPUS, choose_limits
from weft_server import cli
from weft_server.errors import ConfigError
from weft_server.simulate import draw
from weft_server.simulate.arguments import (
    POLICY_NAMES,
    read_jobs,
    read_ranks,
    read_slo,
    read_weights,
    read_window,
)
from weft_server.simulate.scenario import read_shape

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib: pip install 'weft[plots]'"
)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Forty requests of Azure's format within about ten seconds."""
    rows = [f"2023-11-16 18:15:{idx / 4:010.7f},{100 + 37 * idx % 900},{5 + idx}" for idx in range(40)]
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a run that ends with exit code 2."""
    try:
        code: object = cli.main(["simulate", *arguments])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    return capsys.readouterr().err


def test_the_table_reports_latency_finetuning_fairness_and_speed(
    trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", trace, "--tenants", "3", "--adapters", "5", "--jobs", "2:tenants=2"]) == 0
    text = capsys.readouterr().out
    assert "40 of 40 finished" in text
    assert "3 tenants, 5 adapters, 2 finetune jobs" in text
    for word in (
        "first token",
        "per token",
        "attainment",
        "finetuning",
        "Jain",
        "KV",
        "adapters",
        "real time",
    ):
        assert word in text


def test_the_json_holds_the_report_and_the_curves(trace: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert cli.main(["simulate", trace, "--seed", "3", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["report"]["num_finished"] == 40
    assert 0.0 < document["report"]["kept"] <= 1.05
    assert document["limits"]["num_layers"] == 32
    assert document["samples"]
    again = tmp_path / "again.json"
    cli.main(["simulate", trace, "--seed", "3", "--json", str(again)])
    assert json.loads(again.read_text())["report"] == document["report"]


def test_enough_gpus_are_found(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--gpu", "a100", "--rate-scale", "30", "--slo", "ttft=250"]
    assert cli.main(["simulate", trace, *load, "--plan-gpus", "16"]) == 0
    assert "GPUs for 95 % of the requests" in capsys.readouterr().out
    assert cli.main(["simulate", trace, "--slo", "ttft=0.001", "--plan-gpus", "1"]) == 0
    assert "Not even 1 GPUs" in capsys.readouterr().out


def test_every_policy_can_be_chosen(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(POLICIES) == POLICY_NAMES
    for policy in POLICY_NAMES:
        assert cli.main(["simulate", trace, "--duration", "3", "--policy", policy]) == 0
        assert f"policy {policy}" in capsys.readouterr().out


def test_a_device_fitted_by_a_server_is_simulated(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = read_shape("demo")
    limits = choose_limits(shape, GPUS["cpu"], "nf4")
    cost = CostModel()
    cost.calibrate(calibration_samples(Roofline(shape, GPUS["cpu"], "nf4"), limits))
    scheduler = Scheduler(limits, cost, LatencyTargets(0.02, 1.0, 90.0))
    file = tmp_path / "cost_model.json"
    file.write_text(json.dumps(describe(scheduler, model="demo", device="cpu", max_pack_tokens=1024)))
    assert cli.main(["simulate", trace, "--model", "demo", "--gpu", str(file), "--jobs", "1:tokens=64"]) == 0
    text = capsys.readouterr().out
    assert "within 1000 ms to the first token and 20 ms per token (target: 90 %)" in text
    assert "has 32" in refused(capsys, trace, "--gpu", str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere.csv"], "TRACE: trace /nowhere.csv: no such file"),
        (["{trace}", "--model", "gpt-9"], "--model: 'gpt-9' is not allowed. Allowed: a config.json"),
        (["{trace}", "--gpu", "h900"], "--gpu: 'h900' is not allowed. Allowed: h200, a100, l4, cpu, or"),
        (["{trace}", "--gpu", "{trace}"], "not a fitted cost model"),
        (["{trace}", "--gpu", "l4", "--model", "llama-3.1-70b"], "l4 offers"),
        (["{trace}", "--policy", "best"], "invalid choice: 'best'"),
        (["{trace}", "--quantization", "fp2"], "invalid choice: 'fp2'"),
        (["{trace}", "--jobs", "two"], "--jobs: 'two' is not allowed. Allowed: a whole number from 0."),
        (["{trace}", "--jobs", "1:size=3"], "'size=3' is not allowed. Allowed: KEY=VALUE with batch"),
        (["{trace}", "--jobs", "1:rank=0"], "--jobs: rank: '0' is not allowed"),
        (["{trace}", "--jobs", "1:rank=100000"], "lower rank"),
        (["{trace}", "--slo", "speed=3"], "'speed=3' is not allowed. Allowed: KEY=VALUE with tpot, ttft"),
        (["{trace}", "--slo", "tpot=-1"], "--slo: tpot: '-1' is not allowed"),
        (["{trace}", "--slo", "percentile=101"], "101 is not allowed"),
        (
            ["{trace}", "--weights", "nobody=2"],
            "there is no tenant 'nobody' in this simulation. Tenants: default",
        ),
        (["{trace}", "--window", "3"], "--window: '3' is not allowed"),
        (["{trace}", "--rate", "0"], "'0' is not allowed; give a number above 0"),
        (["{trace}", "--tenants", "0"], "'0' is not allowed; give a whole number from 1"),
        (["{trace}", "--adapters", "3", "--adapter-ranks", "big"], "--adapter-ranks: 'big'"),
        (["{trace}", "--duration", "1", "--start", "500"], "no request arrives from 500 s on"),
        (["{trace}", "--json", "/nowhere/x.json", "--duration", "1"], "--json /nowhere/x.json: cannot be"),
    ],
)
def test_what_is_not_allowed_ends_with_2_and_what_is(
    arguments: list[str], message: str, trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *(argument.format(trace=trace) for argument in arguments))


def test_pictures_without_matplotlib_name_the_extra(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw.importlib.util, "find_spec", lambda _name: None)
    message = refused(capsys, trace, "--png", str(tmp_path / "figures"))
    assert "pip install 'weft[plots]'" in message
    assert not (tmp_path / "figures").exists()


@needs_matplotlib
def test_timeline_and_curves_are_drawn(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "figures"
    assert cli.main(["simulate", trace, "--tenants", "9", "--png", str(folder), "--window", "1:2"]) == 0
    assert str(folder / "timeline.png") in capsys.readouterr().out
    for name in ("timeline.png", "curves.png"):
        data = (folder / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width > 800
        assert height > 500
        assert len(data) < 200_000


@needs_matplotlib
def test_tenants_beyond_the_palette_share_a_grey(tmp_path: Path) -> None:
    from weft_scheduler.simulator.timeline import Iteration, Part

    parts = tuple(Part(f"t{idx:02d}", "prefill", 100.0 - idx) for idx in range(12))
    colors = draw.tenant_colors([Iteration(0.0, 0.05, 0.05, 0.05, parts)])
    assert list(colors) == ["t00", "t01", "t02", "t03", "t04", "t05", "6 others"]
    assert colors["6 others"] == draw.REST
    assert len(set(colors.values())) == 7


def test_the_small_languages_of_options() -> None:
    jobs = read_jobs("3:batch=4,tokens=100,steps=7,rank=8,tenants=2")
    assert [job.tenant for job in jobs] == ["trainer-00", "trainer-01", "trainer-00"]
    assert {(j.batch_size, j.example_tokens, j.num_steps, j.rank) for j in jobs} == {(4, 100, 7, 8)}
    assert read_jobs("0") == ()
    slo = read_slo("tpot=40,percentile=99", read_slo("", draw.Slo(ttft_s=1.0)))
    assert (slo.tpot_s, slo.ttft_s, slo.percentile) == (0.04, 1.0, 99.0)
    assert read_weights("a=2,b=0.5", ["a", "b"]) == {"a": 2.0, "b": 0.5}
    assert read_window("1:2.5") == (1.0, 2.5)
    assert read_ranks("8,64") == (8, 64)
    with pytest.raises(ConfigError, match="whole number from 1"):
        read_ranks("8,")


def test_a_config_file_or_its_folder_gives_the_shape(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shape = read_shape(str(folder))
    assert shape == read_shape(str(folder / "config.json"))
    assert (shape.name, shape.num_layers, shape.head_dim, shape.max_model_len) == ("tiny", 3, 16, 256)
    (folder / "config.json").write_text(json.dumps(config | {"num_experts": 8}))
    with pytest.raises(ConfigError, match="num_experts=8"):
        read_shape(str(folder))


def test_the_simulated_sizes_are_those_of_the_engine() -> None:
    from weft_server.engine import sizing

    names = ("max_num_seqs", "max_batch_tokens", "window_tokens", "max_pack_tokens", "pipeline_depth")
    for gpu, defaults in (("h200", sizing.CUDA_DEFAULTS), ("cpu", sizing.CPU_DEFAULTS)):
        values = asdict(defaults)
        assert {name: getattr(GPUS[gpu], name) for name in names} == {name: values[name] for name in names}
    from weft_scheduler.simulator import gpus

    for name in ("BLOCK_SIZE", "NUM_ADAPTER_SLOTS", "TRAINING_ADAPTER_SHARE", "PINNED_ADAPTER_SHARE"):
        assert getattr(gpus, name) == getattr(sizing, name)
    cuda = sizing.CUDA_DEFAULTS
    shares = (cuda.cache_share, cuda.arena_share, cuda.layer_input_share, cuda.activation_share)
    assert shares == (gpus.CACHE_SHARE, gpus.ARENA_SHARE, gpus.LAYER_INPUT_SHARE, gpus.ACTIVATION_SHARE)


@pytest.mark.skipif("WEFT_TEST_DATA" not in os.environ, reason="needs WEFT_TEST_DATA: the real trace")
def test_the_real_trace_keeps_its_targets_beside_a_job(tmp_path: Path) -> None:
    path = Path(os.environ["WEFT_TEST_DATA"]) / "traces" / "azure2023" / "AzureLLMInferenceTrace_conv.csv.gz"
    file = tmp_path / "report.json"
    assert cli.main(["simulate", str(path), "--duration", "60", "--json", str(file)]) == 0
    document: dict[str, Any] = json.loads(file.read_text())
    assert document["report"]["attainment"] > 0.95
    assert document["report"]["kept"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rate", "abc"), ("'abc'", "above 0")),
        (("--max-model-len", "1"), ("'1'", "from 16")),
        (("--max-model-len", "999999999"), ("999999999", "131072", "llama-3.1-8b")),
        (("--weights", "nobody=2"), ("'nobody'", "Tenants")),
        (("--jobs", "1:tokens=4000,max_tokens=10"), ("tokens=4000", "max_tokens=10")),
        (("--jobs", "1:tokens=100000000"), ("100000000", "at most")),
        (("--model", "llama-3.1-70b", "--gpu", "l4"), ("choose a larger device",)),
    ],
)
def test_what_cannot_be_simulated_is_refused_with_the_remedy(
    trace: str, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    message = refused(capsys, trace, *arguments)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("content", "word"), [("[1, 2]", "list"), ("{}", "model_type")])
def test_a_config_that_is_none_is_refused(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, word: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    assert word in refused(capsys, trace, "--model", str(tmp_path / "config.json"))
