"""A client that goes away stops what it asked for."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest

from weft_server import protocol
from weft_server.errors import Overloaded, Unavailable

BASE = "base-model"
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": BASE, "prompt": "Hi", "max_tokens": 100}


def endless(api: Any) -> None:
    """The engine says one word and then computes on until it is told to stop."""
    api.engine.script = lambda request: api.engine.say(request, "one", end=False)


@pytest.mark.parametrize(("path", "body"), [("chat/completions", CHAT), ("completions", COMPLETION)])
def test_leaving_a_stream_aborts_every_choice(api: Any, path: str, body: dict[str, Any]) -> None:
    endless(api)
    with api.http.stream("POST", f"/v1/{path}", json={**body, "n": 2, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        next(response.iter_lines())
    assert api.engine.abort_seen.wait(10)
    wait_for(lambda: len(api.engine.aborted) == 2, api)
    assert sorted(api.engine.aborted) == sorted(request.request_id for request in api.engine.requests)


@pytest.mark.parametrize(("path", "body"), [("chat/completions", CHAT), ("completions", COMPLETION)])
def test_leaving_a_whole_answer_aborts_it(api: Any, path: str, body: dict[str, Any]) -> None:
    endless(api)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{api.url}/v1/{path}", json=body, timeout=0.5)
    assert api.engine.abort_seen.wait(10)
    assert api.engine.aborted == [api.engine.requests[0].request_id]


def test_leaving_before_the_first_token_of_a_stream_aborts_it(api: Any) -> None:
    api.engine.script = lambda _: [None]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{api.url}/v1/completions", json={**COMPLETION, "stream": True}, timeout=0.5)
    assert api.engine.abort_seen.wait(10)


def test_an_error_before_the_first_token_has_its_own_status(api: Any) -> None:
    api.engine.script = lambda _: [Unavailable("the engine restarts", retry_after_s=3)]
    for stream in (False, True):
        response = api.http.post("/v1/completions", json={**COMPLETION, "stream": stream})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "3"
        assert response.json()["error"]["message"] == "the engine restarts"


def test_an_error_in_mid_stream_is_an_event(api: Any) -> None:
    def script(request: protocol.Generate) -> list[Any]:
        return [*api.engine.say(request, "one", end=False)[:-1], Overloaded("too much", code="queue_full")]

    api.engine.script = script
    with api.http.stream("POST", "/v1/completions", json={**COMPLETION, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.status_code == 200
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["error"] == {
        "message": "too much",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }


def test_one_failing_choice_fails_the_request_and_aborts_the_others(api: Any) -> None:
    def script(request: protocol.Generate) -> list[Any]:
        if request.choice_idx == 1:
            return [Overloaded("full", retry_after_s=1)]
        return [None]

    api.engine.script = script
    response = api.http.post("/v1/completions", json={**COMPLETION, "n": 3})
    assert response.status_code == 429
    wait_for(lambda: len(api.engine.aborted) == 2, api)


def test_an_unexpected_exception_is_a_500_without_details(api: Any) -> None:
    def script(request: protocol.Generate) -> list[Any]:
        raise RuntimeError("secret of another tenant")

    api.engine.script = script
    for stream in (False, True):
        response = api.http.post("/v1/completions", json={**COMPLETION, "stream": stream})
        assert response.status_code == 500
        assert "secret" not in response.text
        assert response.json()["error"]["type"] == "server_error"
        assert response.headers["x-request-id"]


def wait_for(condition: Any, api: Any) -> None:
    """Ask again after each further answer of the server, which runs the event loop meanwhile."""
    deadline = threading.Event()
    timer = threading.Timer(10, deadline.set)
    timer.start()
    try:
        while not condition():
            assert not deadline.is_set()
            api.http.get("/health")
    finally:
        timer.cancel()
