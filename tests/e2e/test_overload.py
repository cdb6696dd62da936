"""More than a server can do, and requests in a hurry, through the unmodified openai SDK."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

PROMPT = "Once upon a time"
LONG = 400


@pytest.fixture(scope="module")
def narrow_server(launch: Callable[..., Any], plain_model: Any, helpers: Any) -> Any:
    """One sequence at a time, and one that may wait."""
    flags = ("--max-num-seqs", "1", "--max-queued-requests", "1")
    return launch(plain_model, *helpers.plain, *flags).wait_ready()


class Counting:
    """An SDK client that counts the requests it sends and keeps the answers' statuses and waits."""

    def __init__(self, server: Any, **options: Any) -> None:
        self.answers: list[httpx.Response] = []
        http = httpx.Client(event_hooks={"response": [self.answers.append]})
        self.client = server.openai_client(http_client=http, **options)

    def complete(self, server: Any, max_tokens: int, **body: Any) -> Any:
        return self.client.completions.create(
            model=server.model,
            prompt=PROMPT,
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"ignore_eos": True, **body},
        )


def occupy(server: Any) -> Any:
    """A stream that has begun, and goes on for a while."""
    stream = server.stream(PROMPT, LONG)
    next(stream)
    return stream


def wait_for_queue(server: Any, helpers: Any, length: int) -> None:
    helpers.wait_until(lambda: server.metric("weft_queue_length") == length, f"{length} that wait")


def test_a_timeout_while_generating_is_a_504_that_the_sdk_does_not_repeat(
    narrow_server: Any, helpers: Any
) -> None:
    counting = Counting(narrow_server, max_retries=4)
    began = time.monotonic()
    with pytest.raises(openai.InternalServerError) as caught:
        counting.complete(narrow_server, 480, timeout=0.2)
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert "'timeout' of 0.2 s" in caught.value.message
    assert len(counting.answers) == 1
    assert time.monotonic() - began < 20
    helpers.wait_until(lambda: narrow_server.metric("weft_num_requests_running") == 0, "an idle engine")
    assert narrow_server.metric("weft_request_failure_total", code="deadline_exceeded") == 1


def test_a_timeout_while_waiting_is_a_504_and_the_running_request_goes_on(narrow_server: Any) -> None:
    stream = occupy(narrow_server)
    counting = Counting(narrow_server, max_retries=4)
    with pytest.raises(openai.InternalServerError) as caught:
        counting.complete(narrow_server, 5, timeout=0.05)
    assert "before the first token" in caught.value.message
    assert len(counting.answers) == 1
    assert sum(1 for _ in stream) > 0
    assert len(counting.complete(narrow_server, 5, timeout=60).choices[0].text) > 0


def test_a_timeout_in_a_stream_that_has_begun_is_an_event(narrow_server: Any) -> None:
    stream = narrow_server.client.completions.create(
        model=narrow_server.model,
        prompt=PROMPT,
        max_tokens=480,
        stream=True,
        extra_body={"ignore_eos": True, "timeout": 0.3},
    )
    texts = []
    with pytest.raises(openai.APIError) as caught:
        texts += [chunk.choices[0].text for chunk in stream]
    assert caught.value.code == "deadline_exceeded"


def test_the_sdk_comes_back_to_a_full_queue_when_it_was_told_to(narrow_server: Any, helpers: Any) -> None:
    counting = Counting(narrow_server, max_retries=20)
    engine = narrow_server.engine
    engine.suspend()
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(Counting(narrow_server).complete, narrow_server, 5)
        wait_for_queue(narrow_server, helpers, 1)
        began = time.monotonic()
        coming_back = pool.submit(counting.complete, narrow_server, 5)
        helpers.wait_until(lambda: counting.answers, "a refusal")
        engine.resume()
        assert coming_back.result().usage.completion_tokens == 5
        took_s = time.monotonic() - began
        assert waiting.result().usage.completion_tokens == 5
    *refused, answer = counting.answers
    assert answer.status_code == 200
    assert refused
    assert {one.status_code for one in refused} == {429}
    waits = [int(one.headers["retry-after"]) for one in refused]
    assert all(1 <= wait <= 120 for wait in waits)
    assert took_s >= sum(waits), "the SDK waited as long as it was told to"
    assert narrow_server.metric("weft_requests_shed_total", reason="tenant_queue") == len(refused)


def test_flex_waits_behind_default_and_is_the_first_to_be_refused(
    start_weft: Callable[..., Any], plain_model: Any, helpers: Any
) -> None:
    flags = ("--max-num-seqs", "1", "--max-queued-requests", "2")
    server = start_weft(plain_model, *helpers.plain, *flags).wait_ready()
    engine, stream = server.engine, occupy(server)
    engine.suspend()
    ended: list[str] = []

    def complete(name: str, tier: str) -> Any:
        answer = Counting(server).complete(server, 5, service_tier=tier)
        ended.append(name)
        return answer

    with ThreadPoolExecutor(3) as pool:
        flex = pool.submit(complete, "flex", "flex")
        wait_for_queue(server, helpers, 1)
        newest = pool.submit(complete, "newest flex", "flex")
        wait_for_queue(server, helpers, 2)
        default = pool.submit(complete, "default", "default")
        with pytest.raises(openai.RateLimitError) as caught:
            newest.result()
        assert caught.value.code == "queue_full"
        engine.resume()
        assert sum(1 for _ in stream) > 0
        assert default.result().service_tier == "default"
        assert flex.result().service_tier == "flex"
    assert ended == ["default", "flex"]


def test_a_deadline_is_kept_across_an_engine_death(
    start_weft: Callable[..., Any], plain_model: Any, helpers: Any
) -> None:
    server = start_weft(plain_model, *helpers.plain).wait_ready()
    began = time.monotonic()
    server.engine.suspend()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(Counting(server).complete, server, 480, timeout=1.0)
        time.sleep(0.3)
        server.kill_engine()
        with pytest.raises(openai.InternalServerError) as caught:
            answer.result()
    assert caught.value.code == "deadline_exceeded"
    assert time.monotonic() - began < 15
    server.wait_serving()
    assert server.greedy(PROMPT, 5)


def test_a_job_submitted_again_under_its_key_is_the_same_job_after_a_restart_too(
    start_weft: Callable[..., Any], plain_model: Any, helpers: Any
) -> None:
    server = start_weft(plain_model, *helpers.plain).wait_ready()
    file_id = server.upload_jsonl([{"text": "The dog saw a big red ball."}])

    def submit(server: Any, **changes: Any) -> Any:
        fields = {"model": server.model, "training_file": file_id, "seed": 3, **changes}
        return server.client.fine_tuning.jobs.create(**fields, extra_headers={"Idempotency-Key": "nightly-1"})

    first = submit(server)
    assert submit(server).id == first.id
    server.finished_job(first.id)
    assert server.stop() == 0
    server = start_weft(plain_model, *helpers.plain, data_dir=server.data_dir).wait_ready()
    again = submit(server)
    assert (again.id, again.status) == (first.id, "succeeded")
    assert len(server.client.fine_tuning.jobs.list().data) == 1
    with pytest.raises(openai.ConflictError) as caught:
        submit(server, seed=4)
    assert caught.value.code == "idempotency_key_reused"
