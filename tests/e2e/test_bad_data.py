"""Files, prompts and adapters that cannot be used: refused by name, alone, while the others go on."""

from __future__ import annotations

import json
import pickle
from typing import Any

import openai
import pytest
from safetensors.torch import load, save

PROMPT = "Once upon a time"
GOOD = {"text": "The cat sat on the mat."}


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ("\n\n", "no examples"),
        (json.dumps(GOOD) + "\n" + '{"text": "unfinished\n', "Line 2"),
        ([GOOD, GOOD, {"txt": "a misspelt key"}], "Line 3"),
        ([GOOD, {"prompt": "a", "completion": "b"}], "Line 2"),
        ([GOOD, {"text": "far too long " * 400}], "Line 2"),
        ([GOOD, {"text": 5}], "Line 2"),
    ],
    ids=["blank", "malformed", "unknown-key", "two-formats", "too-long", "wrong-type"],
)
def test_a_file_that_cannot_be_trained_on_fails_its_job_and_names_the_line(
    plain_server: Any, lines: Any, named: str
) -> None:
    job = plain_server.finished_job(plain_server.finetune(lines))
    assert (job.status, job.error.code, job.error.param) == (
        "failed",
        "invalid_training_file",
        "training_file",
    )
    assert named in job.error.message


def test_an_empty_file_is_refused_at_once(plain_server: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="empty"):
        plain_server.upload_jsonl("")


@pytest.mark.parametrize(("overlength", "num_examples"), [("drop", 1), ("truncate", 2)])
def test_overlong_examples_are_dropped_or_truncated_on_request(
    plain_server: Any, overlength: str, num_examples: int
) -> None:
    lines = [GOOD, {"text": "far too long " * 400}]
    job = plain_server.finished_job(plain_server.finetune(lines, overlength=overlength, lora={"r": 1}))
    assert job.status == "succeeded", job.error
    assert len(plain_server.losses(job.id)) == num_examples
    plain_server.wait_for_event(job.id, "1 examples longer than")


def test_a_job_whose_loss_is_not_finite_fails_alone(
    plain_server: Any, helpers: Any, plain_model: Any
) -> None:
    answer = plain_server.upload_adapter("wild", helpers.lora_files(plain_model, scale=1e25))
    assert answer.status_code == 200, answer.text
    good = plain_server.finetune([GOOD] * 20, num_epochs=5)
    expected = plain_server.greedy(PROMPT, 300)
    stream = plain_server.stream(PROMPT, 300)
    job = plain_server.finished_job(plain_server.finetune([GOOD] * 3, model="wild"))
    assert job.status == "failed"
    assert job.error.code == "non_finite_loss"
    assert "step 1" in job.error.message
    assert "line" in job.error.message
    with pytest.raises(openai.InternalServerError) as caught:
        plain_server.greedy(PROMPT, 4, model="wild")
    assert caught.value.code == "non_finite_logits"
    assert "".join(chunk.choices[0].text for chunk in stream) == expected
    assert plain_server.finished_job(good).status == "succeeded"


def broken_adapters(helpers: Any, model_dir: Any) -> dict[str, tuple[bytes, bytes, str]]:
    """Kind → (config, weights, what the refusal must name)."""
    config, weights = helpers.lora_files(model_dir)
    tensors = load(weights)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    wrong_shape = {**tensors, name: tensors[name][:, :-1].contiguous()}
    nan = {**tensors, name: tensors[name] * float("nan")}
    unknown = {**tensors, "base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight": nan[name]}
    missing = {key: tensor for key, tensor in tensors.items() if key != name}

    def with_config(**changes: Any) -> bytes:
        return json.dumps({**json.loads(config), **changes}).encode()

    return {
        "wrong shape": (config, save(wrong_shape), "layers.0.self_attn.q_proj"),
        "NaN": (config, save(nan), "layers.0.self_attn.q_proj"),
        "unknown layer": (config, save(unknown), "layers.99"),
        "missing tensor": (config, save(missing), "layers.0.self_attn.q_proj"),
        "pickle": (config, pickle.dumps({name: [1.0]}), "pickle"),
        "truncated": (config, weights[: len(weights) // 2], "safetensors"),
        "DoRA": (with_config(use_dora=True), weights, "use_dora"),
        "bias": (with_config(bias="all"), weights, "bias"),
        "other method": (with_config(peft_type="IA3"), weights, "peft_type"),
        "unknown module": (with_config(target_modules=["lm_head"]), weights, "lm_head"),
        "no JSON": (b"{", weights, "adapter_config.json"),
    }


def test_adapters_that_cannot_be_served_are_refused_by_name(
    plain_server: Any, helpers: Any, plain_model: Any
) -> None:
    for kind, (config, weights, named) in broken_adapters(helpers, plain_model).items():
        answer = plain_server.upload_adapter("broken", (config, weights))
        assert answer.status_code == 400, f"{kind}: {answer.text}"
        assert named in answer.json()["error"]["message"], f"{kind}: {answer.text}"
    assert plain_server.http.get("/v1/adapters/broken").status_code == 404
