"""kill -9 of the engine: clients see a pause, jobs go on from their checkpoint, poison fails alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

PROMPT = "Once upon a time"
OTHER = "The dog"
STORIES = [{"text": f"The {animal} saw a big red ball in the park."} for animal in ("dog", "cat", "bird")]


@pytest.fixture(scope="module")
def server(launch: Callable[..., Any], plain_model: Any, helpers: Any) -> Any:
    """A server whose engine these tests kill, no more than four times in all."""
    return launch(plain_model, *helpers.plain).wait_ready()


def rest(stream: Any) -> str:
    return "".join(chunk.choices[0].text for chunk in stream)


def test_streams_pause_and_go_on_with_the_text_that_they_would_have_had(server: Any) -> None:
    expected = [server.greedy(prompt, 450) for prompt in (PROMPT, OTHER)]
    random = {"model": server.model, "prompt": PROMPT, "max_tokens": 300, "seed": 11, "temperature": 0.8}
    create = server.client.completions.create
    expected.append(create(**random, extra_body={"ignore_eos": True}).choices[0].text)
    streams = [server.stream(prompt, 450) for prompt in (PROMPT, OTHER)]
    streams.append(create(**random, stream=True, extra_body={"ignore_eos": True}))
    first = [next(stream) for stream in streams]
    server.kill_engine_while_it_plans(*(chunk.id for chunk in first))
    texts = [chunk.choices[0].text + rest(stream) for chunk, stream in zip(first, streams, strict=True)]
    assert texts == expected
    assert server.metric("weft_engine_starts_total") == 2
    assert server.metric("weft_generation_tokens_total") == 2 * (450 + 450 + 300), "counted once each"


def test_a_job_continues_from_its_checkpoint_as_if_nothing_had_happened(server: Any) -> None:
    options = {"num_epochs": 30, "checkpoint_every": 4, "lora": {"r": 4, "dropout": 0.1}}
    undisturbed = server.finetune(STORIES, **options)
    server.finished_job(undisturbed)
    job_id = server.finetune(STORIES, **options)
    server.wait_for_event(job_id, "Checkpoint saved")
    server.kill_engine_while_it_plans(job_id)
    job = server.finished_job(job_id)
    assert job.status == "succeeded", job.error
    message = server.wait_for_event(job_id, "The engine restarted; continuing from step")
    assert int(message.split()[-1]) >= 4
    assert server.losses(job_id) == pytest.approx(server.losses(undisturbed), rel=1e-5)
    for name in (f"ft-{job_id}", f"ft-{undisturbed}"):
        assert len(server.losses(job_id)) == 90
    assert len({server.greedy(PROMPT, 60, model=f"ft-{name}") for name in (job_id, undisturbed)}) == 1


def test_poison_fails_alone_at_its_second_death(server: Any) -> None:
    expected = server.greedy(OTHER, 400)
    poison = server.stream(PROMPT, 480)
    request_id = next(poison).id
    server.kill_engine_while_it_plans(request_id)
    server.wait_serving()
    bystander = server.stream(OTHER, 400)
    chunk = next(bystander)
    server.kill_engine_while_it_plans(request_id, chunk.id)
    with pytest.raises(openai.APIError) as caught:
        rest(poison)
    assert caught.value.code == "engine_crashed"
    assert chunk.choices[0].text + rest(bystander) == expected
    server.wait_serving()
