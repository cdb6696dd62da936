"""/v1/chat/completions through the real SDK."""

from __future__ import annotations

from typing import Any

import openai
import pytest

BASE = "base-model"
HI = [{"role": "user", "content": "Hi"}]


def test_an_answer_has_openais_shape(api: Any) -> None:
    answer = api.client().chat.completions.create(model=BASE, messages=HI)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello there!")
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.usage.prompt_tokens == len(api.engine.requests[0].prompt)


def test_messages_are_rendered_with_the_chat_template(api: Any) -> None:
    api.client().chat.completions.create(
        model=BASE,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "ok"},
            *HI,
        ],
    )
    shown = api.tokenizer.decode(api.engine.requests[0].prompt, skip_special_tokens=False)
    assert shown == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        "<|im_start|>assistant\nok<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_answers_message_can_be_sent_back_as_the_sdk_dumps_it(api: Any) -> None:
    client = api.client()
    message = client.chat.completions.create(model=BASE, messages=HI).choices[0].message
    client.chat.completions.create(model=BASE, messages=[*HI, message.model_dump(), *HI])
    assert len(api.engine.requests) == 2


def test_without_a_limit_the_rest_of_the_context_may_be_used(api: Any) -> None:
    api.client().chat.completions.create(model=BASE, messages=HI)
    sent = api.engine.requests[0]
    assert sent.sampling.max_tokens == 128 - len(sent.prompt)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit_work(api: Any, name: str) -> None:
    answer = api.client().chat.completions.create(model=BASE, messages=HI, **{name: 2})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2
    with pytest.raises(openai.BadRequestError) as caught:
        api.client().chat.completions.create(model=BASE, messages=HI, **{name: 0})
    assert caught.value.param == name


def test_contradicting_limits_are_refused(api: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="contradict"):
        api.client().chat.completions.create(model=BASE, messages=HI, max_tokens=2, max_completion_tokens=3)


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(api: Any) -> None:
    chunks = list(api.client().chat.completions.create(model=BASE, messages=HI, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello there!"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].delta.content is None


def test_the_sdks_streaming_helper_accumulates_choices_and_usage(api: Any) -> None:
    with api.client().chat.completions.stream(
        model=BASE, messages=HI, n=2, stream_options={"include_usage": True}
    ) as stream:
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["Hello there!"] * 2
    assert final.usage.completion_tokens == 2 * (len(api.tokenizer.encode("Hello there!")) + 1)


def test_logprobs_carry_bytes_and_alternatives(api: Any) -> None:
    text = "one 🙂"
    api.engine.script = lambda request: api.engine.say(request, text)
    options = {"model": BASE, "messages": HI, "logprobs": True, "top_logprobs": 3}
    content = api.client().chat.completions.create(**options).choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode() == text
    assert all(len(token.top_logprobs) == 3 for token in content)
    chunks = list(api.client().chat.completions.create(**options, stream=True))
    streamed = [
        token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content
    ]
    assert [token.model_dump() for token in streamed] == [token.model_dump() for token in content]


def test_top_logprobs_without_logprobs_is_refused(api: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.client().chat.completions.create(model=BASE, messages=HI, top_logprobs=2)
    assert caught.value.param == "top_logprobs"


def test_template_variables_are_passed(api: Any) -> None:
    api.client().chat.completions.create(
        model=BASE, messages=HI, extra_body={"chat_template_kwargs": {"enable_thinking": False}}
    )
    with pytest.raises(openai.BadRequestError) as caught:
        api.client().chat.completions.create(
            model=BASE, messages=HI, extra_body={"chat_template_kwargs": {"messages": []}}
        )
    assert caught.value.param == "chat_template_kwargs"


def test_a_model_without_template_answers_400(start_api: Any, api_tokenizer: Any) -> None:
    from weft_server.service.tokenizer import Tokenizer

    api = start_api(tokenizer=Tokenizer(api_tokenizer._backend))
    with pytest.raises(openai.BadRequestError, match="no chat template") as caught:
        api.client().chat.completions.create(model=BASE, messages=HI)
    assert caught.value.code == "no_chat_template"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": "x", "mood": "glad"}, "messages[0].mood"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls"),
        ("hello", "messages[0]"),
    ],
)
def test_a_bad_message_is_named(api: Any, message: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.client().chat.completions.create(model=BASE, messages=[message])
    assert caught.value.param == param


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [CALL]}, "messages[0].tool_calls"),
        ({"role": "tool", "content": "4", "tool_call_id": "c"}, "messages[0].role"),
        ({"role": "function", "content": "4", "name": "f"}, "messages[0].role"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "messages[0].audio"),
        ({"role": "assistant", "content": "x", "reasoning_content": "y"}, "messages[0].reasoning_content"),
    ],
)
def test_known_parts_of_a_message_that_would_change_the_answer_are_unsupported(
    api: Any, message: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.client().chat.completions.create(model=BASE, messages=[message])
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)


def test_an_image_is_refused_by_name(api: Any) -> None:
    part = {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}
    with pytest.raises(openai.BadRequestError, match="image_url") as caught:
        api.client().chat.completions.create(model=BASE, messages=[{"role": "user", "content": [part]}])
    assert caught.value.code == "unsupported_parameter"


def test_no_messages_are_refused(api: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.client().chat.completions.create(model=BASE, messages=[])
    assert caught.value.param == "messages"
