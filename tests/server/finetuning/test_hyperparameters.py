"""What a request's hyperparameters resolve to, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft_server.errors import InvalidRequest, Unprocessable
from weft_server.protocol import LoraSpec
from weft_server.service.hyperparameters import (
    MODULES,
    HyperparameterRequest,
    LoraRequest,
    lora_of,
    max_seq_length,
    resolve,
    seed_of,
    spec_from_value,
    spec_to_value,
    validate,
)


def _resolve(request: HyperparameterRequest, num_examples: int = 100) -> Any:
    return resolve(request, job_id="ftjob-1", lora=lora_of(request.lora), num_examples=num_examples)


def test_everything_left_open_gets_the_documented_defaults() -> None:
    spec = _resolve(HyperparameterRequest(), num_examples=640)
    assert (spec.num_epochs, spec.batch_size, spec.total_steps) == (3, 10, 192)
    assert (spec.learning_rate, spec.lr_scheduler, spec.warmup_ratio) == (2e-4, "linear", 0.03)
    assert (spec.weight_decay, spec.max_grad_norm) == (0.0, 1.0)
    assert (spec.adam_beta1, spec.adam_beta2, spec.adam_eps) == (0.9, 0.999, 1e-8)
    assert spec.lora == LoraSpec(16, 32.0, 0.0, MODULES, use_rslora=False)


@given(st.integers(1, 100_000), st.integers(1, 20), st.integers(1, 100), st.none() | st.integers(1, 500))
def test_total_steps_is_epochs_times_batches_within_max_steps(
    num_examples: int, num_epochs: int, batch_size: int, max_steps: int | None
) -> None:
    request = HyperparameterRequest(num_epochs=num_epochs, batch_size=batch_size, max_steps=max_steps)
    spec = _resolve(request, num_examples)
    assert spec.total_steps == min(max_steps or math.inf, num_epochs * math.ceil(num_examples / batch_size))
    assert 10 <= spec.checkpoint_every <= 100


@pytest.mark.parametrize(("num_examples", "batch_size"), [(1, 1), (63, 1), (128, 2), (1024, 16), (10**6, 16)])
def test_an_automatic_batch_size_grows_with_the_examples_up_to_16(num_examples: int, batch_size: int) -> None:
    assert _resolve(HyperparameterRequest(), num_examples).batch_size == batch_size


def test_the_multiplier_multiplies_the_default_learning_rate() -> None:
    assert _resolve(HyperparameterRequest(learning_rate_multiplier=0.5)).learning_rate == 1e-4
    assert _resolve(HyperparameterRequest(learning_rate=3e-5)).learning_rate == 3e-5


def test_a_learning_rate_and_a_multiplier_together_are_a_400() -> None:
    request = HyperparameterRequest(learning_rate=1e-4, learning_rate_multiplier=1.0)
    with pytest.raises(InvalidRequest, match=r"learning_rate.*learning_rate_multiplier"):
        validate(request, context_tokens=512)


def test_the_seed_comes_from_the_job_id_unless_given() -> None:
    assert seed_of(HyperparameterRequest(seed=7), "ftjob-1") == 7
    first, second = (seed_of(HyperparameterRequest(), job_id) for job_id in ("ftjob-1", "ftjob-2"))
    assert first != second
    assert first == seed_of(HyperparameterRequest(), "ftjob-1")
    assert 0 <= first < 2**31


def test_the_longest_example_is_the_context_but_at_most_2048() -> None:
    assert max_seq_length(HyperparameterRequest(), context_tokens=512) == 512
    assert max_seq_length(HyperparameterRequest(), context_tokens=8192) == 2048
    assert max_seq_length(HyperparameterRequest(max_seq_length=4096), context_tokens=8192) == 4096


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"num_epochs": 0}, InvalidRequest, "hyperparameters.n_epochs"),
        ({"num_epochs": 1001}, InvalidRequest, "hyperparameters.n_epochs"),
        ({"batch_size": 0}, InvalidRequest, "hyperparameters.batch_size"),
        ({"batch_size": 1025}, InvalidRequest, "hyperparameters.batch_size"),
        ({"learning_rate_multiplier": 0.0}, InvalidRequest, "hyperparameters.learning_rate_multiplier"),
        ({"learning_rate_multiplier": math.inf}, InvalidRequest, "hyperparameters.learning_rate_multiplier"),
        ({"seed": -1}, InvalidRequest, "seed"),
        ({"seed": 2**63}, InvalidRequest, "seed"),
        ({"learning_rate": 0.0}, Unprocessable, "weft.learning_rate"),
        ({"learning_rate": math.nan}, Unprocessable, "weft.learning_rate"),
        ({"learning_rate": 1.5}, Unprocessable, "weft.learning_rate"),
        ({"warmup_ratio": -0.1}, Unprocessable, "weft.warmup_ratio"),
        ({"warmup_ratio": 1.1}, Unprocessable, "weft.warmup_ratio"),
        ({"weight_decay": -1.0}, Unprocessable, "weft.weight_decay"),
        ({"max_grad_norm": 0.0}, Unprocessable, "weft.max_grad_norm"),
        ({"max_seq_length": 1}, Unprocessable, "weft.max_seq_length"),
        ({"max_seq_length": 513}, Unprocessable, "weft.max_seq_length"),
        ({"checkpoint_every": 0}, Unprocessable, "weft.checkpoint_every"),
        ({"max_steps": 0}, Unprocessable, "weft.max_steps"),
        ({"lr_scheduler": "polynomial"}, Unprocessable, "weft.lr_scheduler"),
        ({"overlength": "wrap"}, Unprocessable, "weft.overlength"),
        ({"lora": LoraRequest(rank=0)}, Unprocessable, "weft.lora.r"),
        ({"lora": LoraRequest(rank=257)}, Unprocessable, "weft.lora.r"),
        ({"lora": LoraRequest(alpha=0.0)}, Unprocessable, "weft.lora.alpha"),
        ({"lora": LoraRequest(dropout=1.0)}, Unprocessable, "weft.lora.dropout"),
        ({"lora": LoraRequest(dropout=math.nan)}, Unprocessable, "weft.lora.dropout"),
        ({"lora": LoraRequest(target_modules=())}, Unprocessable, "weft.lora.target_modules"),
        (
            {"lora": LoraRequest(target_modules=("q_proj", "q_proj"))},
            Unprocessable,
            "weft.lora.target_modules",
        ),
        ({"lora": LoraRequest(target_modules=("lm_head",))}, Unprocessable, "weft.lora.target_modules"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name_and_limit(
    changes: dict[str, Any], error: type[Exception], param: str
) -> None:
    with pytest.raises(error) as caught:
        validate(replace(HyperparameterRequest(), **changes), context_tokens=512)
    assert caught.value.param == param
    assert param in caught.value.message


def test_the_limits_themselves_are_allowed() -> None:
    for request in (
        HyperparameterRequest(num_epochs=1, batch_size=1, learning_rate_multiplier=1000.0, seed=0),
        HyperparameterRequest(learning_rate=1.0, warmup_ratio=1.0, max_seq_length=512, max_steps=1),
        HyperparameterRequest(lora=LoraRequest(rank=256, alpha=0.5, dropout=0.0, target_modules=MODULES)),
    ):
        validate(request, context_tokens=512)


def test_target_modules_are_put_in_the_order_of_the_model() -> None:
    assert lora_of(LoraRequest(target_modules=("down_proj", "q_proj"))).target_modules == (
        "q_proj",
        "down_proj",
    )


CONTINUED = LoraSpec(8, 16.0, 0.1, ("q_proj", "v_proj"))


def test_a_continued_adapter_gives_the_shape_and_only_dropout_may_change() -> None:
    assert lora_of(LoraRequest(), CONTINUED) == CONTINUED
    same = LoraRequest(rank=8, alpha=16.0, target_modules=("v_proj", "q_proj"), use_rslora=False)
    assert lora_of(same, CONTINUED) == CONTINUED
    assert lora_of(LoraRequest(dropout=0.0), CONTINUED).dropout == 0.0


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (LoraRequest(rank=16), "weft.lora.r"),
        (LoraRequest(alpha=32.0), "weft.lora.alpha"),
        (LoraRequest(target_modules=MODULES), "weft.lora.target_modules"),
        (LoraRequest(use_rslora=True), "weft.lora.use_rslora"),
    ],
)
def test_a_shape_that_contradicts_the_continued_adapter_is_refused(request_: LoraRequest, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        lora_of(request_, CONTINUED)
    assert caught.value.param == param


def test_requests_and_specs_survive_the_store() -> None:
    request = HyperparameterRequest(num_epochs=2, lora=LoraRequest(target_modules=("q_proj",)))
    assert HyperparameterRequest.from_value(json.loads(json.dumps(request.to_value()))) == request
    spec = _resolve(request)
    assert spec_from_value(json.loads(json.dumps(spec_to_value(spec)))) == spec


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            HyperparameterRequest(seed=2**63),
            "seed is 9223372036854775808; it must be at least 0 and at most 9223372036854775807.",
        ),
        (
            HyperparameterRequest(max_steps=100_000_001),
            "weft.max_steps is 100000001; it must be at least 1 and at most 100000000.",
        ),
        (
            HyperparameterRequest(learning_rate=1.0000001),
            "weft.learning_rate is 1.0000001; it must be greater than 0 and at most 1.",
        ),
    ],
)
def test_values_and_limits_are_printed_exactly(request_: HyperparameterRequest, message: str) -> None:
    with pytest.raises((InvalidRequest, Unprocessable)) as caught:
        validate(request_, context_tokens=512)
    assert caught.value.message == message
