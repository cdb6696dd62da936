"""Every case of `weft bench kernels` is right on a tiny shape, and would be found out if it were wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from weft_kernels import lora as lora_package
from weft_server.bench.ceilings import Ceilings
from weft_server.bench.kernels import lora, main
from weft_server.bench.kernels.case import TOLERANCE, OpCase, Subject
from weft_server.bench.kernels.main import Measured, add_targets, all_cases, measure
from weft_server.bench.models import RandomModel
from weft_server.bench.report import Report
from weft_server.bench.shapes import Shape, read_shape
from weft_server.bench.stats import Stopwatch

CPU = torch.device("cpu")
CEILINGS = Ceilings(100.0, 100.0, None, "bfloat16")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def subject(dtype: torch.dtype) -> Subject:
    tiny = read_shape("tiny")
    shape = Shape("tiny", {**tiny.hf_config, "num_hidden_layers": 1})
    return Subject(RandomModel(shape, dtype=dtype, device=CPU), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_case_and_every_peer_runs_and_is_right(dtype: torch.dtype) -> None:
    operators = set()
    for case in all_cases(subject(dtype), read_shape("tiny")):
        assert case.error() <= TOLERANCE[dtype], (case.op, case.shape)
        case.run()
        for call in case.peers.values():
            assert call is not None
            call()
        assert case.num_bytes > 0
        operators.add(case.op)
    assert {"linear dense", "linear nf4", "linear int8", "lora forward", "lora backward"} <= operators
    assert {"attention decode", "attention prefill", "loss head, loss and gradient"} <= operators
    assert {"norm backward", "rope and write to the cache", "swiglu backward"} <= operators
    assert {"draw tokens", "adapter load"} <= operators


def test_a_scale_that_is_lost_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_scale(x, y, table, layer, modules, widths, batch, dropout=None):  # type: ignore[no-untyped-def]
        before = y.clone()
        lora_package.lora_forward(x, y, table, layer, modules, widths, batch, dropout)
        y.sub_(before).mul_(0.5).add_(before)

    monkeypatch.setattr(lora, "lora_forward", without_scale)
    cases = [case for case in lora.cases(subject(torch.float32)) if case.op == "lora forward"]
    assert cases
    assert all(case.error() > 0.4 for case in cases)


def test_a_case_is_held_against_the_slower_of_memory_arithmetic_and_link() -> None:
    ceilings = Ceilings(100.0, 10.0, 5.0, "bfloat16")
    case = OpCase("op", "shape", num_bytes=200.0, flops=10.0, run=lambda: None, error=lambda: 0.0)

    def roofline_us(case: OpCase) -> float:
        return measure(case, Stopwatch(CPU), 0.0).roofline_us(ceilings)

    assert roofline_us(case) == pytest.approx(2e6)
    assert roofline_us(replace(case, flops=50.0)) == pytest.approx(5e6)
    assert roofline_us(replace(case, crosses_link=True)) == pytest.approx(40e6)
    better = ceilings.best_of(Ceilings(50.0, 20.0, 6.0, "bfloat16"))
    assert better == Ceilings(100.0, 20.0, 6.0, "bfloat16")


def test_peers_that_are_not_to_be_had_are_not_measured() -> None:
    ceilings = Ceilings(100.0, 10.0, None, "bfloat16")
    case = OpCase("op", "s", 1.0, 1.0, lambda: None, lambda: 0.0, peers={"vLLM": None, "torch": lambda: None})
    measured = measure(case, Stopwatch(CPU), 0.0)
    assert measured.peers["vLLM"] is None
    assert measured.peers["torch"] is not None
    report = Report("kernels", "Operators")
    main.add_rows(report, [measured], ceilings)
    assert report.tables[0].rows[0][5:] == ("vLLM", None, None)


def _measured(op: str, shape: str, vllm: float | None = None, share: float = 1.0) -> Measured:
    """A roofline of a second for 100 bytes."""
    peers = {"vLLM": None if vllm is None else (1.0, vllm)}
    return Measured(op, shape, 100.0 * share, 0.0, False, 1e6, peers)


def test_on_a_gpu_the_worst_group_decides_about_targets() -> None:
    report = Report("kernels", "Operators")
    measured = [
        _measured("lora forward", "qkv, 32 adapters of rank 16, 32 rows", 1.5),
        _measured("lora forward", "down, 32 adapters of rank 16, 32 rows", 0.9),
        _measured("lora forward", "qkv, 32 adapters of ranks 8/16/32/64, 32 rows", 2.0),
        _measured("adapter load", "rank 16, all linears", share=0.85),
    ]
    add_targets(report, measured, CEILINGS, on_gpu=True)
    assert [target.verdict for target in report.targets] == ["no, by 0.1x", "yes", "yes"]
    unknown = Report("kernels", "Operators")
    row = _measured("lora forward", "qkv, 32 adapters of rank 16, 32 rows")
    add_targets(unknown, [row], CEILINGS, on_gpu=True)
    assert [target.verdict for target in unknown.targets] == ["not measured"] * 3
    assert math.isclose(report.targets[2].measured or 0.0, 85.0)
