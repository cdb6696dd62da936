"""Finetuning over HTTP while others are served; the adapter that comes out is PEFT's too."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

PROMPT = "Once upon a time"
STORIES = [
    {"text": f"Once upon a time, a {animal} named Tim saw a {thing}. The {animal} was very happy."}
    for animal in ("dog", "cat", "bird", "frog")
    for thing in ("ball", "tree", "car")
]


class Talker(threading.Thread):
    """Streams the same prompt again and again; keeps every text and counts tokens as they come."""

    def __init__(self, server: Any, prompt: str) -> None:
        super().__init__(daemon=True)
        self.server, self.prompt = server, prompt
        self.num_chunks = 0
        self.texts: list[str] = []
        self.error: Exception | None = None
        self.enough = threading.Event()

    def run(self) -> None:
        try:
            while not self.enough.is_set():
                text = ""
                for chunk in self.server.stream(self.prompt, 150):
                    text += chunk.choices[0].text
                    self.num_chunks += 1
                self.texts.append(text)
        except Exception as error:
            self.error = error

    def finish(self) -> None:
        self.enough.set()
        self.join(60)
        assert not self.is_alive()
        assert self.error is None, self.error


@pytest.fixture(scope="module")
def trained(plain_server: Any) -> Any:
    """A job that ran while two streams went on; `talkers` and `spoken` tell what these did meanwhile."""
    server = plain_server
    quiet = [server.greedy(prompt, 150) for prompt in (PROMPT, "The dog")]
    talkers = [Talker(server, prompt) for prompt in (PROMPT, "The dog")]
    for talker in talkers:
        talker.start()
    job_id = server.finetune(STORIES, num_epochs=3, adapter_name="teller", lora={"r": 8, "alpha": 16})
    server.wait_for_event(job_id, "Step 1/36")
    before = [talker.num_chunks for talker in talkers]
    job = server.finished_job(job_id)
    spoken = [talker.num_chunks - count for talker, count in zip(talkers, before, strict=True)]
    for talker in talkers:
        talker.finish()
    job.__dict__["spoken"] = spoken
    job.__dict__["texts"] = [(set(talker.texts), text) for talker, text in zip(talkers, quiet, strict=True)]
    return job


def test_tokens_arrive_while_a_job_trains_and_are_the_same_as_ever(trained: Any) -> None:
    assert trained.status == "succeeded", trained.error
    assert all(count > 0 for count in trained.spoken)
    for texts, quiet in trained.texts:
        assert texts == {quiet}


def test_the_loss_falls_and_every_step_is_reported_once(plain_server: Any, trained: Any) -> None:
    losses = plain_server.losses(trained.id)
    assert list(losses) == list(range(1, 37))
    assert sum(list(losses.values())[-12:]) < sum(list(losses.values())[:12])


def test_the_trained_model_is_served_at_once_and_differs_from_the_base(
    plain_server: Any, trained: Any
) -> None:
    assert trained.fine_tuned_model == "teller"
    assert plain_server.greedy(PROMPT, 40, model="teller") != plain_server.greedy(PROMPT, 40)


@pytest.fixture(scope="module")
def peft_teller(plain_server: Any, trained: Any, plain_model: Path, tmp_path_factory: Any) -> Any:
    """PEFT's view of the downloaded adapter on transformers' view of the base."""
    import io
    import tarfile

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    content = plain_server.http.get("/v1/adapters/teller/download", params={"version": 1}).content
    directory = tmp_path_factory.mktemp("teller")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for name in tar.getnames():
            (directory / name).write_bytes(tar.extractfile(name).read())
    base = AutoModelForCausalLM.from_pretrained(plain_model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, directory).eval(), AutoTokenizer.from_pretrained(plain_model)


def test_peft_computes_the_same_logprobs_with_the_downloaded_adapter(
    plain_server: Any, peft_teller: Any
) -> None:
    model, tokenizer = peft_teller
    answer = plain_server.client.completions.create(
        model="teller@1", prompt=PROMPT, max_tokens=30, temperature=0, echo=True, logprobs=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    prompt_ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        ids = model.generate(
            input_ids=prompt_ids, max_new_tokens=30, min_new_tokens=30, do_sample=False, pad_token_id=0
        )
        logprobs = model(input_ids=ids).logits.log_softmax(-1)
    expected = logprobs[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(
        torch.tensor(answer.choices[0].logprobs.token_logprobs[1:]), expected, rtol=1e-4, atol=1e-4
    )


def test_training_goes_on_from_an_adapter_as_its_next_version(plain_server: Any, trained: Any) -> None:
    server = plain_server
    stream = server.stream(PROMPT, 450, model="teller")
    text = next(stream).choices[0].text
    job = server.finished_job(server.finetune(STORIES, model="teller", adapter_name="teller"))
    assert job.fine_tuned_model == "teller"
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert [v["version"] for v in server.http.get("/v1/adapters/teller").json()["versions"]] == [1, 2]
    first, second = (server.greedy(PROMPT, 450, model=f"teller@{number}") for number in (1, 2))
    assert text == first, "a request keeps the version it began with"
    assert server.greedy(PROMPT, 450, model="teller") == second != first
    from_scratch, continued = server.losses(trained.id), server.losses(job.id)
    assert continued[1] < from_scratch[1], "the second job began where the first ended"


def test_a_continued_adapter_keeps_its_shape(plain_server: Any, trained: Any) -> None:
    answer = plain_server.http.post(
        "/v1/fine_tuning/jobs",
        json={
            "model": "teller",
            "training_file": plain_server.upload_jsonl(STORIES),
            "weft": {"lora": {"r": 4}},
        },
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "weft.lora.r")
