"""What `usage` says of the prefix cache, through the real SDK; the same is counted as a metric."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

BASE = "base-model"
HI = [{"role": "user", "content": "Hi"}]


def usage_of(api: Any, stream: bool, **request: Any) -> Any:
    client = api.client()
    create = client.chat.completions.create if "messages" in request else client.completions.create
    if not stream:
        return create(model=BASE, **request).usage
    *others, last = create(model=BASE, **request, stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in others)
    return last.usage


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("request_body", [{"messages": HI}, {"prompt": "Hello there!", "max_tokens": 4}])
def test_usage_says_how_much_of_the_prompt_was_cached(
    api: Any, stream: bool, request_body: dict[str, Any]
) -> None:
    assert usage_of(api, stream, **request_body).prompt_tokens_details.cached_tokens == 0
    api.engine.script = lambda request: api.engine.say(request, "Hello there!", num_cached=3)
    usage = usage_of(api, stream, **request_body)
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_of_the_choices_of_a_prompt_the_one_that_found_least_counts(start_api: Any, stream: bool) -> None:
    api = start_api()
    found = {0: 2, 1: 8, 2: 8, 3: 5, 4: 8, 5: 1}
    api.engine.script = lambda request: api.engine.say(
        request, "Hello", num_cached=found[int(request.request_id.rsplit("-", 1)[1])]
    )
    usage = usage_of(api, stream, prompt=["one two three", "Hello there!"], n=3, max_tokens=2)
    assert usage.prompt_tokens_details.cached_tokens == 2 + 1
    families = text_string_to_metric_families(api.http.get("/metrics").text)
    samples = {sample.name: sample for family in families for sample in family.samples}
    counted = samples["weft_prompt_tokens_cached_total"]
    assert (counted.labels["tenant"], counted.value) == ("default", 3)


def test_an_echo_alone_finds_nothing_cached(api: Any) -> None:
    usage = usage_of(api, False, prompt="Hello", echo=True, max_tokens=0)
    assert usage.prompt_tokens_details.cached_tokens == 0
