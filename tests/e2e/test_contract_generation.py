"""Generation as the unmodified OpenAI SDK sees it, on the bundled model."""

from __future__ import annotations

import re
from typing import Any

import openai
import pytest

PROMPT = "Once upon a time"
METRICS = {
    "weft_num_requests_running", "weft_num_requests_waiting", "weft_kv_cache_usage_perc",
    "weft_time_to_first_token_seconds_count", "weft_inter_token_latency_seconds_count",
    "weft_e2e_request_latency_seconds_count", "weft_iteration_time_seconds_count", "weft_prompt_tokens_total",
    "weft_generation_tokens_total", "weft_request_success_total", "weft_finetune_steps_total",
    "weft_adapter_loads_total", "weft_num_preemptions_total", "weft_http_responses_total",
    "weft_engine_starts_total", "weft_prefix_cache_queries_total", "weft_prefix_cache_hits_total",
    "weft_prompt_tokens_cached_total",
}  # fmt: skip


def test_the_base_is_listed_and_retrieved(contract_server: Any) -> None:
    models = contract_server.client.models
    base = models.retrieve(contract_server.model)
    assert contract_server.model in [model.id for model in models.list()]
    assert (base.id, base.object) == (contract_server.model, "model")


def test_health_and_readiness_are_told_without_a_key(contract_server: Any) -> None:
    assert contract_server.http.get("/health").status_code == 200
    ready = contract_server.http.get("/ready").json()
    assert (ready["status"], ready["quantization"]) == ("ready", "nf4")


def test_a_completion_has_openais_shape(contract_server: Any) -> None:
    answer = contract_server.client.completions.create(
        model=contract_server.model, prompt=PROMPT, max_tokens=5, extra_body={"ignore_eos": True}
    )
    assert (answer.object, answer.model) == ("text_completion", contract_server.model)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5


def test_a_prompt_sent_again_is_found_in_the_cache(contract_server: Any) -> None:
    request = {"model": contract_server.model, "prompt": list(range(100, 150)), "max_tokens": 2}
    create = contract_server.client.completions.create
    first, second = create(**request, temperature=0), create(**request, temperature=0)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == 48
    assert second.choices[0].text == first.choices[0].text


def test_a_chat_answers_and_streams_the_same_text(contract_server: Any) -> None:
    request = {
        "model": contract_server.model,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_completion_tokens": 12,
        "temperature": 0,
    }
    create = contract_server.client.chat.completions.create
    whole = create(**request)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_chat_logprobs_name_each_token_and_its_alternatives(contract_server: Any) -> None:
    answer = contract_server.client.chat.completions.create(
        model=contract_server.model,
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    for token in answer.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs) <= 0


def test_a_streamed_completion_is_the_whole_one_in_pieces(contract_server: Any) -> None:
    request = {"model": contract_server.model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    create = contract_server.client.completions.create
    whole = create(**request, logprobs=2)
    chunks = list(create(**request, logprobs=2, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    tokens = [token for chunk in chunks[:-1] for token in chunk.choices[0].logprobs.tokens]
    assert tokens == whole.choices[0].logprobs.tokens
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_seed_repeats_its_choices_and_choices_differ(contract_server: Any) -> None:
    def draw(seed: int) -> list[str]:
        answer = contract_server.client.completions.create(
            model=contract_server.model, prompt=PROMPT, max_tokens=12, n=3, seed=seed, temperature=1.5
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert len(set(draw(1))) > 1


def test_several_prompts_are_answered_in_order(contract_server: Any) -> None:
    prompts = [PROMPT, "The cat", "A big red ball"]
    answer = contract_server.client.completions.create(
        model=contract_server.model, prompt=prompts, max_tokens=8, temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    alone = [contract_server.greedy(prompt, 8) for prompt in prompts]
    assert [choice.text for choice in answer.choices] == alone


def test_echoed_prompts_come_with_their_logprobs(contract_server: Any) -> None:
    answer = contract_server.client.completions.create(
        model=contract_server.model, prompt=PROMPT, max_tokens=3, temperature=0, echo=True, logprobs=1
    )
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith(PROMPT)
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == answer.usage.total_tokens


def test_a_stop_string_ends_the_text_before_it(contract_server: Any) -> None:
    whole = contract_server.greedy(PROMPT, 40)
    stop = whole.split()[4]
    for stream in (False, True):
        answer = contract_server.client.completions.create(
            model=contract_server.model, prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop],
            stream=stream, extra_body={"ignore_eos": True},
        )  # fmt: skip
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_token_ids_are_prompts_too(contract_server: Any) -> None:
    answer = contract_server.client.completions.create(
        model=contract_server.model, prompt=[5, 80, 147], max_tokens=2, extra_body={"ignore_eos": True}
    )
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 2)
    with pytest.raises(openai.BadRequestError, match="999999"):
        contract_server.client.completions.create(model=contract_server.model, prompt=[999999])


def test_a_logit_bias_and_vllms_fields_are_obeyed(contract_server: Any) -> None:
    create = contract_server.client.completions.create
    banned = create(
        model=contract_server.model, prompt=[5, 80], max_tokens=3, logit_bias={"100": 100}, logprobs=0
    )
    assert len(set(banned.choices[0].logprobs.tokens)) == 1
    single = create(
        model=contract_server.model, prompt=PROMPT, max_tokens=8, temperature=2, seed=3,
        extra_body={"top_k": 1, "ignore_eos": True},
    )  # fmt: skip
    assert single.choices[0].text == contract_server.greedy(PROMPT, 8)


def test_an_unknown_model_is_a_404(contract_server: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        contract_server.client.completions.create(model="nobody", prompt=PROMPT)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"best_of": 3}, "unsupported_parameter"),
        ({"suffix": "the end"}, "unsupported_parameter"),
        ({"extra_body": {"no_such_field": 1}}, "unknown_parameter"),
        ({"max_tokens": 100_000}, "context_length_exceeded"),
        ({"temperature": 3.0}, "invalid_value"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    contract_server: Any, fields: dict[str, Any], code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        contract_server.client.completions.create(model=contract_server.model, prompt=PROMPT, **fields)
    assert caught.value.code == code
    assert caught.value.type == "invalid_request_error"


def test_a_prompt_longer_than_the_context_is_refused(contract_server: Any) -> None:
    limit = contract_server.http.get("/ready").json()["max_model_len"]
    with pytest.raises(openai.BadRequestError, match=f"{limit} tokens") as caught:
        contract_server.client.completions.create(model=contract_server.model, prompt=[5] * (limit + 1))
    assert caught.value.code == "context_length_exceeded"


def test_neutral_values_and_metadata_are_accepted(contract_server: Any) -> None:
    contract_server.client.chat.completions.create(
        model=contract_server.model,
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=1,
        presence_penalty=0,
        tools=[],
        user="somebody",
        metadata={"trace": "1"},
        store=False,
    )


def test_every_response_has_a_request_id(contract_server: Any) -> None:
    http = contract_server.http
    for path in ("/health", "/v1/models", "/no/such/route"):
        assert http.get(path).headers["x-request-id"]
        assert http.get(path, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"


def test_errors_below_the_api_have_openais_shape(contract_server: Any) -> None:
    http = contract_server.http
    no_route = http.get("/v1/nothing")
    bad_json = http.post("/v1/completions", content=b"{not json")
    wrong_method = http.put("/v1/completions", json={})
    too_large = http.post("/v1/completions", content=b'"' + b"x" * (17 << 20) + b'"')
    answers = (no_route, bad_json, wrong_method, too_large)
    assert [answer.status_code for answer in answers] == [404, 400, 405, 413]
    for answer in answers:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_metrics_have_their_names_and_counters_grow(contract_server: Any, helpers: Any) -> None:
    names = {"weft_generation_tokens_total": 16.0, "weft_request_success_total": 1.0}
    before = {name: contract_server.metric(name) for name in names}
    contract_server.greedy(PROMPT, 16)
    for name, growth in names.items():
        assert contract_server.metric(name) == before[name] + growth
    text = contract_server.http.get("/metrics").text
    assert set(re.findall(r"^(weft_\w+)\{", text, re.MULTILINE)) >= METRICS
    helpers.wait_until(lambda: contract_server.metric("weft_num_requests_running") == 0, "an idle engine")
