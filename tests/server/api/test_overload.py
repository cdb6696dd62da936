"""Request classes, deadlines and full queues, as clients see them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from weft_server import protocol
from weft_server.api import completions, streaming
from weft_server.errors import DeadlineExceeded
from weft_server.service.tenants import key_digest

BASE = "base-model"
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": BASE, "prompt": "Hi", "max_tokens": 100}
BOTH = pytest.mark.parametrize(("path", "body"), [("completions", COMPLETION), ("chat/completions", CHAT)])
KEYS = {"a": "key-of-a", "b": "key-of-b"}


def keys_file(**options: dict[str, Any]) -> str:
    tables = []
    for tenant, key in KEYS.items():
        lines = [f"{name} = {value}" for name, value in options.get(tenant, {}).items()]
        tables.append(
            "\n".join(["[[tenants]]", f'name = "{tenant}"', f'keys = ["{key_digest(key)}"]', *lines])
        )
    return "\n".join(tables)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error


# ---------------------------------------------------------------- fields


@BOTH
def test_the_class_of_a_request_reaches_the_engine(api: Any, path: str, body: dict[str, Any]) -> None:
    given = {"service_tier": "flex", "priority": -3, "timeout": 30, "n": 2}
    assert api.http.post(f"/v1/{path}", json={**body, **given}).status_code == 200
    assert len(api.engine.requests) == 2
    for request in api.engine.requests:
        assert (request.tier, request.priority) == ("flex", -3)
        assert 0 < request.remaining_s <= 30


@BOTH
def test_by_default_requests_are_of_the_default_tier_and_have_all_the_time(
    api: Any, path: str, body: dict[str, Any]
) -> None:
    nothing = {"service_tier": "auto", "priority": None, "timeout": None}
    for given in ({}, nothing, {"service_tier": "default"}):
        assert api.http.post(f"/v1/{path}", json={**body, **given}).json()["service_tier"] == "default"
        request = api.engine.requests.pop()
        assert (request.tier, request.priority, request.remaining_s) == ("default", 0, None)


def test_the_sdk_sees_the_tier_that_was_used(api: Any) -> None:
    client = api.client()
    answer = client.chat.completions.create(**CHAT, service_tier="flex")
    assert answer.service_tier == "flex"
    chunks = list(client.chat.completions.create(**CHAT, service_tier="auto", stream=True))
    assert {chunk.service_tier for chunk in chunks} == {"default"}


@BOTH
@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("service_tier", "priority", "unsupported_parameter"),
        ("service_tier", "scale", "unsupported_parameter"),
        ("service_tier", "gold", "invalid_value"),
        ("service_tier", 1, "invalid_type"),
        ("priority", 1.5, "invalid_type"),
        ("priority", True, "invalid_type"),
        ("priority", 2**31, "invalid_value"),
        ("timeout", 0, "invalid_value"),
        ("timeout", -1, "invalid_value"),
        ("timeout", 86401, "invalid_value"),
        ("timeout", "5", "invalid_type"),
        ("timeout", True, "invalid_type"),
    ],
)
def test_a_bad_class_is_refused_by_name(
    api: Any, path: str, body: dict[str, Any], field: str, value: Any, code: str
) -> None:
    response = api.http.post(f"/v1/{path}", json={**body, field: value})
    assert response.status_code == 400
    assert (error_of(response)["param"], error_of(response)["code"]) == (field, code)


# ---------------------------------------------------------------- deadlines


def test_a_deadline_after_tokens_tells_how_many_there_were(api: Any) -> None:
    def script(request: protocol.Generate) -> list[Any]:
        return [*api.engine.say(request, "one two", end=False)[:-1], DeadlineExceeded("late")]

    api.engine.script = script
    num_tokens = len(api.tokenizer.encode("one two", add_special_tokens=False))
    body = {**COMPLETION, "timeout": 7}
    response = api.http.post("/v1/completions", json=body)
    assert response.status_code == 504
    assert f"'timeout' of 7 s ended after {num_tokens} tokens" in error_of(response)["message"]
    with api.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        assert stream.status_code == 200
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "deadline_exceeded"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-2]) == "one two"


def test_a_request_whose_time_is_up_before_it_is_sent_never_reaches_the_engine(
    api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = api.tokenizer.encode

    def slow(text: str, **options: Any) -> Any:
        waited.wait(0.05)
        return encode(text, **options)

    waited = threading.Event()
    monkeypatch.setattr(api.tokenizer, "encode", slow)
    response = api.http.post("/v1/completions", json={**COMPLETION, "timeout": 0.01})
    assert response.status_code == 504
    assert api.engine.requests == []


def test_the_sdk_does_not_try_a_missed_deadline_again(api: Any) -> None:
    api.engine.script = lambda _: [DeadlineExceeded("late")]
    client = api.client().with_options(max_retries=3)
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(**COMPLETION, extra_body={"timeout": 1})
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert len(api.engine.requests) == 1


# ---------------------------------------------------------------- queues


class Waiting:
    """An engine whose choices get no token before `go`; the names of the requests that wait."""

    def __init__(self, api: Any) -> None:
        self.api = api
        self.loop: asyncio.AbstractEventLoop | None = None
        self.go = asyncio.Event()
        inner = api.engine.generate

        async def generate(request: protocol.Generate) -> Any:
            self.loop = asyncio.get_running_loop()
            if not self.go.is_set():
                api.engine.requests.append(request)
                await self.go.wait()
                api.engine.requests.remove(request)
            async for delta in inner(request):
                yield delta

        api.engine.generate = generate

    def wait_for(self, num_waiting: int) -> None:
        pause = threading.Event()
        for _ in range(500):
            if len(self.api.engine.requests) >= num_waiting:
                return
            pause.wait(0.02)
        raise AssertionError(f"{len(self.api.engine.requests)} of {num_waiting} requests wait")

    def release(self) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.go.set)


def post(api: Any, key: str = "none", **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{api.url}/v1/completions", json={**COMPLETION, **fields}, headers=headers, timeout=20)


def test_a_full_queue_is_a_429_with_the_predicted_wait_and_the_rest_goes_on(
    start_api: Callable[..., Any],
) -> None:
    api = start_api(max_queued_requests="3")
    waiting = Waiting(api)
    api.engine.heartbeat = protocol.Heartbeat(1, {}, {}, queues={"default": protocol.TenantQueue(2, 17.0)})
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, api, n=3)
        waiting.wait_for(3)
        refused = post(api)
        waiting.release()
        assert first.result().status_code == 200
    assert refused.status_code == 429
    assert error_of(refused)["code"] == "queue_full"
    assert error_of(refused)["type"] == "rate_limit_error"
    assert refused.headers["retry-after"] == "34", "17 s for 2, so 34 s for 4"
    assert post(api, n=3).status_code == 200
    assert 'weft_requests_shed_total{model_name="base-model",reason="tenant_queue",tenant="default"} 1.0' in (
        api.http.get("/metrics").text
    )


def test_a_waiting_request_is_shed_for_another_tenants_and_a_begun_one_is_not(
    start_api: Callable[..., Any],
) -> None:
    api = start_api(
        keys=keys_file(a={"admin": "true"}), max_queued_requests="4", max_queued_requests_total="5"
    )
    waiting = Waiting(api)
    with ThreadPoolExecutor(4) as pool:
        flood = [pool.submit(post, api, KEYS["a"], n=2)]
        waiting.wait_for(2)
        flood.append(pool.submit(post, api, KEYS["a"], n=2))
        waiting.wait_for(4)
        modest = pool.submit(post, api, KEYS["b"], n=2)
        shed = flood[1].result()
        assert shed.status_code == 429
        assert "retry-after" in shed.headers
        assert error_of(shed)["code"] == "queue_full"
        waiting.release()
        assert flood[0].result().status_code == 200
        assert modest.result().status_code == 200
    metrics = httpx.get(f"{api.url}/metrics", headers={"authorization": f"Bearer {KEYS['a']}"}).text
    assert 'requests_shed_total{model_name="base-model",reason="server_queue",tenant="a"} 2.0' in metrics
    assert "abort" not in metrics


def test_a_stream_whose_200_is_out_is_not_shed(
    start_api: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def impatient(*arguments: Any, **options: Any) -> Any:
        return await streaming.event_stream(*arguments, **options, patience_s=0.0)

    monkeypatch.setattr(completions, "event_stream", impatient)
    api = start_api(max_queued_requests="1")
    waiting = Waiting(api)
    body = {**COMPLETION, "stream": True, "service_tier": "flex"}
    with api.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        refused = post(api)
        assert refused.status_code == 429, "default may not push out what has begun"
        waiting.release()
        assert "Hello there!" in "".join(
            json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            for line in response.iter_lines()
            if line.startswith("data: {")
        )


def test_more_choices_than_a_queue_holds_are_a_400(start_api: Callable[..., Any]) -> None:
    api = start_api(max_queued_requests="3")
    response = post(api, n=4)
    assert response.status_code == 400
    assert error_of(response)["code"] == "too_many_choices"


def test_a_client_that_leaves_the_queue_makes_room(start_api: Callable[..., Any]) -> None:
    api = start_api(max_queued_requests="1")
    api.engine.script = lambda _: [None]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{api.url}/v1/completions", json=COMPLETION, timeout=0.3)
    assert api.engine.abort_seen.wait(10)
    api.engine.reset()
    assert post(api).status_code == 200
