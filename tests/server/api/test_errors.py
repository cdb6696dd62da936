"""Every failure has OpenAI's shape, names what is wrong, and carries a request id."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from weft_server.errors import DeadlineExceeded

BASE = "base-model"
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": BASE, "prompt": "Hi"}


def error_of(response: Any) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/", 404, "unknown_url"),
        ("POST", "/v1/completions/", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/models", 405, "method_not_allowed"),
    ],
)
def test_unknown_routes_and_methods(api: Any, method: str, path: str, status: int, code: str) -> None:
    response = api.http.request(method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == code


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"model": NaN}',
        b'{"model": "\xff"}',
        b'{"prompt": "\\ud800x"}',
        b"[" * 100_000,
    ],
)
def test_bad_json_is_a_400(api: Any, body: bytes) -> None:
    response = api.http.post("/v1/completions", content=body)
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_json"


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"null", b"3"])
def test_json_that_is_no_object_is_a_400(api: Any, body: bytes) -> None:
    response = api.http.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_type"


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("temperature", "hot", "invalid_type"),
        ("temperature", 2.5, "invalid_value"),
        ("temperature", -1, "invalid_value"),
        ("temperature", True, "invalid_type"),
        ("max_tokens", 1.5, "invalid_type"),
        ("max_tokens", "5", "invalid_type"),
        ("max_tokens", -1, "invalid_value"),
        ("max_tokens", 0, "invalid_value"),
        ("top_p", 0, "invalid_value"),
        ("top_p", 1.1, "invalid_value"),
        ("min_p", 2, "invalid_value"),
        ("top_k", -2, "invalid_value"),
        ("n", 0, "invalid_value"),
        ("n", 129, "invalid_value"),
        ("presence_penalty", 3, "invalid_value"),
        ("frequency_penalty", -2.1, "invalid_value"),
        ("repetition_penalty", 0, "invalid_value"),
        ("seed", 2**63, "invalid_value"),
        ("logprobs", 21, "invalid_value"),
        ("logit_bias", {"a": 1}, "invalid_value"),
        ("logit_bias", {"9999": 1}, "invalid_value"),
        ("logit_bias", [1], "invalid_type"),
        ("stop", 5, "invalid_value"),
        ("stop", ["a", ""], "invalid_value"),
        ("stop", ["x"] * 17, "invalid_value"),
        ("stop_token_ids", [400], "invalid_value"),
        ("stop_token_ids", 5, "invalid_type"),
        ("min_tokens", 17, "invalid_value"),
        ("stream", "yes", "invalid_type"),
        ("prompt", 5, "invalid_value"),
        ("prompt", [], "invalid_value"),
        ("prompt", [1, "a"], "invalid_value"),
        ("prompt", [[]], "invalid_value"),
        ("prompt", [400], "invalid_value"),
        ("prompt", [-1], "invalid_value"),
        ("prompt", "", "empty_prompt"),
        ("model", 5, "invalid_type"),
        ("model", "", "invalid_value"),
        ("model", "nobody", "model_not_found"),
        ("model", "no/../body", "model_not_found"),
    ],
)
def test_a_bad_value_is_named(api: Any, field: str, value: Any, code: str) -> None:
    response = api.http.post("/v1/completions", json={**COMPLETION, field: value})
    assert response.status_code == (404 if code == "model_not_found" else 400)
    error = error_of(response)
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    assert error["param"] == field or error["param"].startswith((f"{field}.", f"{field}["))
    assert api.engine.requests == []


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_missing_field_is_named(api: Any, missing: str) -> None:
    response = api.http.post(
        "/v1/chat/completions", json={key: value for key, value in CHAT.items() if key != missing}
    )
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("missing_required_parameter", missing)


@pytest.mark.parametrize(
    ("path", "body", "field", "value"),
    [
        ("completions", COMPLETION, "suffix", "end"),
        ("completions", COMPLETION, "prompt_logprobs", 1),
        ("completions", COMPLETION, "use_beam_search", True),
        ("completions", COMPLETION, "store", True),
        ("completions", COMPLETION, "include_stop_str_in_output", True),
        ("completions", COMPLETION, "guided_json", {"type": "object"}),
        ("completions", COMPLETION, "add_special_tokens", False),
        ("chat/completions", CHAT, "tools", [{"type": "function", "function": {"name": "f"}}]),
        ("chat/completions", CHAT, "tool_choice", "required"),
        ("chat/completions", CHAT, "response_format", {"type": "json_object"}),
        ("chat/completions", CHAT, "modalities", ["text", "audio"]),
        ("chat/completions", CHAT, "reasoning_effort", "high"),
        ("chat/completions", CHAT, "verbosity", "low"),
        ("chat/completions", CHAT, "store", True),
        ("chat/completions", CHAT, "web_search_options", {}),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(
    api: Any, path: str, body: dict[str, Any], field: str, value: Any
) -> None:
    response = api.http.post(f"/v1/{path}", json={**body, field: value})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)
    assert field in error["message"]


def test_neutral_values_and_caller_metadata_are_accepted(api: Any) -> None:
    common = {
        "user": "u1",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "presence_penalty": 0,
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "stop": None,
        "seed": None,
        "stream_options": None,
    }
    chat = {
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "functions": [],
        "function_call": "none",
        "audio": None,
        "verbosity": "medium",
        "logprobs": False,
        "top_logprobs": None,
    }
    completion = {"suffix": "", "best_of": 1, "logprobs": None, "echo": False, "skip_special_tokens": True}
    assert api.http.post("/v1/chat/completions", json={**CHAT, **common, **chat}).status_code == 200
    assert api.http.post("/v1/completions", json={**COMPLETION, **common, **completion}).status_code == 200


@pytest.mark.parametrize(("path", "body"), [("completions", COMPLETION), ("chat/completions", CHAT)])
def test_an_unknown_field_is_named(api: Any, path: str, body: dict[str, Any]) -> None:
    response = api.http.post(f"/v1/{path}", json={**body, "temprature": 0})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("unknown_parameter", "temprature")
    response = api.http.post(f"/v1/{path}", json={**body, "stream": True, "stream_options": {"usage": True}})
    assert error_of(response)["param"] == "stream_options.usage"


def test_stream_options_need_a_stream(api: Any) -> None:
    response = api.http.post(
        "/v1/completions", json={**COMPLETION, "stream_options": {"include_usage": True}}
    )
    assert response.status_code == 400
    assert error_of(response)["param"] == "stream_options"


def test_too_many_choices_in_all_are_refused(api: Any) -> None:
    response = api.http.post("/v1/completions", json={**COMPLETION, "prompt": ["x"] * 100, "n": 100})
    assert response.status_code == 400
    assert error_of(response)["code"] == "too_many_choices"


def test_a_deadline_is_a_504_that_asks_for_no_retry(api: Any) -> None:
    api.engine.script = lambda _: [DeadlineExceeded("too late")]
    response = api.http.post("/v1/completions", json={**COMPLETION, "timeout": 2.5})
    assert response.status_code == 504
    assert response.headers["x-should-retry"] == "false"
    error = error_of(response)
    assert (error["code"], error["param"]) == ("deadline_exceeded", "timeout")
    assert "'timeout' of 2.5 s ended before the first token" in error["message"]


def test_a_sane_request_id_is_returned_and_others_are_replaced(api: Any) -> None:
    given = api.http.get("/health", headers={"x-request-id": "abc-123:X"})
    assert given.headers["x-request-id"] == "abc-123:X"
    for bad in ("a b", "x" * 200, "ä".encode()):
        answer = api.http.get("/health", headers={"x-request-id": bad})
        assert answer.headers["x-request-id"].startswith("req_")
    with pytest.raises(openai.NotFoundError) as caught:
        api.client().models.retrieve("nobody")
    assert caught.value.request_id is not None


def test_an_oversized_json_body_is_a_413(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft_server.api.bodies.MAX_JSON_BYTES", 1000)
    response = api.http.post("/v1/completions", json={**COMPLETION, "prompt": "x" * 2000})
    assert response.status_code == 413
    assert error_of(response)["code"] == "too_large"
