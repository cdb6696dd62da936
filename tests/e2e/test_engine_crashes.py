"""kill -9 of the engine: clients see a pause, jobs go on from their checkpoint, poison fails alone."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from weft_server.service.tenants import key_digest

PROMPT = "Once upon a time"
OTHER = "The dog"
STORIES = [{"text": f"The {animal} saw a big red ball in the park."} for animal in ("dog", "cat", "bird")]
POISON = 666
POISONED_ENGINE = f"""
import os, signal, sys

if "weft_server.engine" in sys.orig_argv:
    from weft_server.engine.runner import Runner

    submit = Runner.submit

    def submit_unless_poisonous(self, plan, jobs, *rest):
        for segment in plan.forward:
            sequence = self.sequence(segment.sequence_id)
            if sequence is not None and sequence.params.seed == {POISON} and len(sequence.output) >= 20:
                os.kill(os.getpid(), signal.SIGKILL)
            job = jobs.get(segment.sequence_id.split("/")[0])
            if job is not None and job.spec.seed == {POISON} and job.num_steps_done >= 5:
                os.kill(os.getpid(), signal.SIGKILL)
        return submit(self, plan, jobs, *rest)

    Runner.submit = submit_unless_poisonous
"""


@pytest.fixture
def poisonable(tmp_path: Path) -> dict[str, str]:
    """An environment in which engines die of a request's 21st token, or of a job's sixth step, if its seed is
    POISON."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(POISONED_ENGINE)
    return {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}


def numbers_in_fatal_plans(server: Any) -> list[int]:
    """How many requests and jobs were in the plan of each death."""
    return [int(number) for number in re.findall(r"engine \d+ died .* in its plan: (\d+)", server.log)]


@pytest.fixture(scope="module")
def server(launch: Callable[..., Any], plain_model: Any, helpers: Any) -> Any:
    """A server whose engine these tests kill, fewer than five times in all."""
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
    server.kill_engine()  # a second time, before it has planned anything: that is nobody's fault
    texts = [chunk.choices[0].text + rest(stream) for chunk, stream in zip(first, streams, strict=True)]
    assert texts == expected
    assert server.metric("weft_engine_starts_total") == 2
    assert server.metric("weft_generation_tokens_total") == 2 * (450 + 450 + 300), "counted once each"


def test_a_job_continues_from_its_checkpoint_as_if_nothing_had_happened(server: Any) -> None:
    options = {"num_epochs": 60, "checkpoint_every": 4, "lora": {"r": 4, "dropout": 0.1}}
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
    assert len(server.losses(job_id)) == 180
    assert len({server.greedy(PROMPT, 60, model=f"ft-{name}") for name in (job_id, undisturbed)}) == 1


def test_what_arrives_while_the_engine_is_away_waits_or_is_told_to_come_back(
    server: Any, helpers: Any, plain_model: Any
) -> None:
    def num_blobs() -> int:
        blobs = server.data_dir / "blobs"
        return sum(path.is_file() and path.parent.name != "tmp" for path in blobs.rglob("*"))

    expected = server.greedy(PROMPT, 30)
    num_before = num_blobs()
    server.engine.suspend()
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(server.upload_adapter, "poet", helpers.lora_files(plain_model))
        helpers.wait_until(lambda: num_blobs() == num_before + 2, "both files to be kept")
        server.kill_engine()
        assert server.http.get("/ready").status_code == 503
        assert server.greedy(PROMPT, 30) == expected
        answer = upload.result()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert server.upload_adapter("poet", helpers.lora_files(plain_model)).json()["versions"]


def test_a_poisonous_request_fails_alone_though_others_were_in_its_iteration_both_times(
    start_weft: Callable[..., Any], plain_model: Any, helpers: Any, poisonable: dict[str, str], tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(
        "".join(f'[[tenants]]\nname = "{name}"\nkeys = ["{key_digest(name)}"]\n' for name in ("ann", "bob"))
    )
    server = start_weft(plain_model, *helpers.plain, "--api-keys", str(keys), env=poisonable).wait_ready()
    ann, bob = server.openai_client("ann"), server.openai_client("bob")
    expected = server.greedy(OTHER, 480, client=bob)
    job_id = server.finetune(STORIES, client=bob, num_epochs=60, checkpoint_every=5)
    bystander = server.stream(OTHER, 480, client=bob)
    chunk = next(bystander)
    poison = server.stream(PROMPT, 480, client=ann, seed=POISON)
    with pytest.raises(openai.APIError) as caught:
        rest(poison)
    assert caught.value.code == "engine_crashed"
    assert chunk.choices[0].text + rest(bystander) == expected
    job = server.finished_job(job_id, client=bob)
    assert job.status == "succeeded", job.error
    first, second = numbers_in_fatal_plans(server)
    assert first == 3
    assert second >= 2, "the bystander was cleared, and beside the poison again"


@pytest.mark.slow
def test_a_poisonous_job_fails_alone_though_others_were_in_its_iteration_both_times(
    start_weft: Callable[..., Any], plain_model: Any, helpers: Any, poisonable: dict[str, str]
) -> None:
    server = start_weft(plain_model, *helpers.plain, env=poisonable).wait_ready()
    expected = server.greedy(OTHER, 480)
    bystander_job = server.finetune(STORIES, num_epochs=200, checkpoint_every=1)
    server.wait_for_event(bystander_job, "Checkpoint saved")
    poison = server.finetune(STORIES, num_epochs=100, checkpoint_every=1, seed=POISON)
    assert server.greedy(OTHER, 480) == expected
    job = server.finished_job(poison)
    assert (job.status, job.error.code) == ("failed", "engine_crashed")
    assert server.finished_job(bystander_job).status == "succeeded"
    assert len(numbers_in_fatal_plans(server)) == 2


@pytest.mark.slow
def test_an_engine_that_hangs_is_replaced(
    start_weft: Callable[..., Any], plain_model: Any, helpers: Any
) -> None:
    """Slow: an engine counts as hung after 30 seconds without a heartbeat."""
    server = start_weft(plain_model, *helpers.plain).wait_ready()
    expected = server.greedy(PROMPT, 450)
    stream = server.stream(PROMPT, 450)
    first = next(stream)
    server.engine.suspend()
    assert first.choices[0].text + rest(stream) == expected
    assert server.metric("weft_engine_starts_total") == 2
