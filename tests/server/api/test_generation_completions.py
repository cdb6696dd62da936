"""/v1/completions through the real SDK."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from weft_server import protocol
from weft_server.errors import InvalidRequest

BASE = "base-model"
EOS = 2


def test_a_completion_has_openais_shape(api: Any) -> None:
    answer = api.client().completions.create(model=BASE, prompt="Hello", max_tokens=50)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == BASE
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (
        "Hello there!",
        "stop",
        0,
        None,
    )
    (sent,) = api.engine.requests
    assert answer.usage.prompt_tokens == len(sent.prompt) == len(api.tokenizer.encode("Hello"))
    assert answer.usage.completion_tokens == len(api.tokenizer.encode("Hello there!")) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert sent.tenant == "default"
    assert sent.adapter is None
    assert api.engine.aborted == []


def test_defaults_are_openais_and_the_end_id_stops(api: Any) -> None:
    api.client().completions.create(model=BASE, prompt="Hello")
    sampling = api.engine.requests[0].sampling
    assert sampling.max_tokens == 16
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, None, 0.0)
    assert sampling.stop_token_ids == (EOS,)
    assert sampling.logprobs is None


def test_every_sampling_field_reaches_the_engine(api: Any) -> None:
    api.client().completions.create(
        model=BASE,
        prompt="Hello",
        max_tokens=9,
        temperature=0.3,
        top_p=0.8,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        logit_bias={"5": -100, "7": 1.5},
        seed=42,
        extra_body={
            "top_k": 40,
            "min_p": 0.05,
            "repetition_penalty": 1.2,
            "min_tokens": 3,
            "stop_token_ids": [11, 12],
        },
    )
    sampling = api.engine.requests[0].sampling
    assert sampling == protocol.SamplingParams(
        max_tokens=9,
        temperature=0.3,
        top_p=0.8,
        top_k=40,
        min_p=0.05,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        repetition_penalty=1.2,
        logit_bias={5: -100.0, 7: 1.5},
        seed=42,
        min_tokens=3,
        stop_token_ids=(EOS, 11, 12),
    )


def test_ignore_eos_leaves_only_the_length(api: Any) -> None:
    answer = api.client().completions.create(
        model=BASE, prompt="Hi", max_tokens=3, extra_body={"ignore_eos": True}
    )
    assert api.engine.requests[0].sampling.stop_token_ids == ()
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize("top_k", [0, -1])
def test_vllms_spellings_of_no_top_k_are_understood(api: Any, top_k: int) -> None:
    api.client().completions.create(model=BASE, prompt="Hi", extra_body={"top_k": top_k})
    assert api.engine.requests[0].sampling.top_k is None


def test_prompts_may_be_texts_or_ids_or_lists_of_them(api: Any) -> None:
    client = api.client()
    one, two = api.tokenizer.encode("one"), api.tokenizer.encode("two")
    for prompt, expected in [
        ("one", [one]),
        (["one", "two"], [one, two]),
        (one, [one]),
        ([one, two], [one, two]),
    ]:
        api.engine.requests.clear()
        answer = client.completions.create(model=BASE, prompt=prompt)
        assert [
            sent.prompt for sent in sorted(api.engine.requests, key=lambda sent: sent.request_id)
        ] == expected
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))
        assert answer.usage.prompt_tokens == sum(map(len, expected))


def test_choices_are_numbered_prompt_by_prompt_and_share_a_seed_per_prompt(api: Any) -> None:
    answer = api.client().completions.create(model=BASE, prompt=["one", "one"], n=3, max_tokens=4)
    assert [choice.index for choice in answer.choices] == list(range(6))
    sent = sorted(api.engine.requests, key=lambda request: int(request.request_id.rsplit("-", 1)[1]))
    assert [request.choice_idx for request in sent] == [0, 1, 2, 0, 1, 2]
    seeds = [request.sampling.seed for request in sent]
    assert seeds[0] == seeds[1] == seeds[2] != seeds[3] == seeds[4] == seeds[5]
    assert answer.usage.prompt_tokens == 2 * len(api.tokenizer.encode("one"))
    assert answer.usage.completion_tokens == 24


def test_best_of_is_only_accepted_where_it_changes_nothing(api: Any) -> None:
    assert len(api.client().completions.create(model=BASE, prompt="x", n=2, best_of=2).choices) == 2
    with pytest.raises(openai.BadRequestError) as caught:
        api.client().completions.create(model=BASE, prompt="x", best_of=2)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "best_of")


def test_a_stream_concatenates_to_the_whole_answer(api: Any) -> None:
    text = "Grüße, 你好 🙂 there!"
    api.engine.script = lambda request: api.engine.say(request, text)
    chunks = list(api.client().completions.create(model=BASE, prompt="Hi", max_tokens=60, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert not any("\ufffd" in chunk.choices[0].text for chunk in chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert {chunk.choices[0].finish_reason for chunk in chunks[:-1]} == {None}
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_ends_with_usage_when_asked(api: Any) -> None:
    chunks = list(
        api.client().completions.create(
            model=BASE,
            prompt=["a", "b"],
            n=2,
            max_tokens=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])
    ended = [chunk.choices[0].index for chunk in chunks[:-1] if chunk.choices[0].finish_reason]
    assert sorted(ended) == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_itself_and_aborts_the_engine(api: Any, stream: bool) -> None:
    api.engine.script = lambda request: api.engine.say(request, "one two three four", end=False)
    answer = api.client().completions.create(
        model=BASE, prompt="x", max_tokens=100, stop=["three", "zzz"], stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == "one two "
    assert choices[-1].finish_reason == "stop"
    assert api.engine.abort_seen.wait(10)
    assert api.engine.aborted == [api.engine.requests[0].request_id]


def test_a_stop_string_may_be_a_special_token(api: Any) -> None:
    api.client().completions.create(model=BASE, prompt="x", stop="<|im_start|>")
    assert api.engine.requests[0].sampling.stop_token_ids == (EOS, 1)


def test_stop_strings_are_not_looked_for_before_min_tokens(api: Any) -> None:
    api.engine.script = lambda request: api.engine.say(request, "aXbXcX", end=False)
    num_first = len(api.tokenizer.encode("aX", add_special_tokens=False))
    answer = api.client().completions.create(
        model=BASE, prompt="x", max_tokens=50, stop="X", extra_body={"min_tokens": num_first + 1}
    )
    assert answer.choices[0].text == "aXb"


def test_logprobs_are_aligned_with_the_text(api: Any) -> None:
    answer = api.client().completions.create(model=BASE, prompt="Hi", max_tokens=50, logprobs=2)
    (choice,) = answer.choices
    scored = choice.logprobs
    assert "".join(scored.tokens) == choice.text == "Hello there!"
    for token, offset in zip(scored.tokens, scored.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)
    assert set(scored.token_logprobs) == {-0.5}
    assert all(
        token in top and len(top) <= 3 for token, top in zip(scored.tokens, scored.top_logprobs, strict=True)
    )


def test_streamed_logprobs_are_those_of_the_whole_answer(api: Any) -> None:
    text = "one 🙂 three"
    api.engine.script = lambda request: api.engine.say(request, text)
    options = {"model": BASE, "prompt": "Hi", "max_tokens": 50, "logprobs": 1, "stop": "zz"}
    whole = api.client().completions.create(**options).choices[0].logprobs
    chunks = list(api.client().completions.create(**options, stream=True))
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for piece in pieces for token in piece.tokens] == whole.tokens
    assert [offset for piece in pieces for offset in piece.text_offset] == whole.text_offset
    assert any(token.startswith("bytes:\\xf0") for token in whole.tokens)


def test_tokens_behind_a_stop_string_have_no_logprobs(api: Any) -> None:
    api.engine.script = lambda request: api.engine.say(request, "one two three", end=False)
    answer = api.client().completions.create(model=BASE, prompt="x", max_tokens=50, stop="two", logprobs=0)
    choice = answer.choices[0]
    assert choice.text == "one "
    assert all(offset < len("one ") for offset in choice.logprobs.text_offset)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_repeats_the_prompt_with_its_logprobs(api: Any, stream: bool) -> None:
    answer = api.client().completions.create(
        model=BASE, prompt="How are you?", max_tokens=50, echo=True, logprobs=1, stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    text = "".join(choice.text for choice in choices)
    assert text == "How are you?Hello there!"
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    values = [value for choice in choices for value in choice.logprobs.token_logprobs]
    assert "".join(tokens) == text
    assert all(text[offset:].startswith(token) for token, offset in zip(tokens, offsets, strict=True))
    assert values[0] is None
    assert None not in values[1:]


def test_echo_of_token_ids_shows_their_text(api: Any) -> None:
    ids = api.tokenizer.encode("How 🙂 you")
    answer = api.client().completions.create(model=BASE, prompt=ids, max_tokens=1, echo=True, logprobs=0)
    assert answer.choices[0].text.startswith("How 🙂 you")


def test_scoring_a_prompt_needs_no_new_token(api: Any) -> None:
    answer = api.client().completions.create(
        model=BASE, prompt="How are", max_tokens=0, echo=True, logprobs=1
    )
    (choice,) = answer.choices
    assert choice.text == "How are" == "".join(choice.logprobs.tokens)
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 0
    assert api.engine.requests[0].sampling.max_tokens == 1
    api.engine.requests.clear()
    plain = api.client().completions.create(model=BASE, prompt="How are", max_tokens=0, echo=True)
    assert plain.choices[0].text == "How are"
    assert api.engine.requests == []


def test_an_adapter_that_does_not_fit_the_arena_is_named_as_the_request_named_it(api: Any) -> None:
    api.store_adapter("default", "giant")
    refusal = InvalidRequest("The adapter takes 9 MiB.", code="adapter_too_large")
    api.engine.script = lambda _request: [refusal]
    with pytest.raises(openai.BadRequestError, match="Model 'giant': The adapter takes 9 MiB") as caught:
        api.client().completions.create(model="giant", prompt="x")
    assert caught.value.code == "adapter_too_large"


def test_a_prompt_that_fills_the_context_can_be_scored_but_not_continued(api: Any) -> None:
    client, prompt = api.client(), [5] * api.engine.info.max_model_len
    answer = client.completions.create(model=BASE, prompt=prompt, max_tokens=0, echo=True, logprobs=1)
    assert len(answer.choices[0].logprobs.tokens) == len(prompt)
    for num_prompt, max_tokens, total in ((128, 1, 129), (129, 0, 129)):
        with pytest.raises(openai.BadRequestError, match=f"you requested {total} tokens") as caught:
            client.completions.create(
                model=BASE, prompt=[5] * num_prompt, max_tokens=max_tokens, echo=True, logprobs=1
            )
        assert caught.value.code == "context_length_exceeded"


def test_minus_infinity_is_written_as_a_number(api: Any) -> None:
    def script(request: protocol.Generate) -> list[Any]:
        scored = protocol.TokenLogprob(5, float("-inf"), ((6, float("-inf")),))
        return [protocol.ChoiceDelta(request.request_id, [5], [scored], "length")]

    api.engine.script = script
    answer = api.client().completions.create(model=BASE, prompt="x", logprobs=1)
    assert answer.choices[0].logprobs.token_logprobs == [-9999.0]


def test_several_tokens_in_a_delta_are_all_shown(api: Any) -> None:
    ids = api.tokenizer.encode("Hello there!")
    api.engine.script = lambda request: [protocol.ChoiceDelta(request.request_id, [*ids, EOS], None, "stop")]
    answer = api.client().completions.create(model=BASE, prompt="x")
    assert answer.choices[0].text == "Hello there!"
    assert answer.usage.completion_tokens == len(ids) + 1


@pytest.mark.parametrize("max_tokens", [126, 200])
def test_a_request_beyond_the_context_is_refused_with_the_numbers(api: Any, max_tokens: int) -> None:
    prompt = api.tokenizer.encode("one two three")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 128") as caught:
        api.client().completions.create(model=BASE, prompt=prompt, max_tokens=max_tokens)
    assert caught.value.code == "context_length_exceeded"
    assert api.engine.requests == []
    fits = 128 - len(prompt)
    api.client().completions.create(model=BASE, prompt=prompt, max_tokens=fits)
    assert api.engine.requests[0].sampling.max_tokens == fits


def test_the_models_generation_config_gives_the_defaults(start_api: Any) -> None:
    from weft_server.service.sampling import GenerationDefaults

    api = start_api(defaults=GenerationDefaults(temperature=0.6, top_p=0.9, top_k=20, max_new_tokens=7))
    api.client().completions.create(model=BASE, prompt="x")
    api.client().completions.create(model=BASE, prompt="x", temperature=0, extra_body={"top_k": -1})
    first, second = (request.sampling for request in api.engine.requests)
    assert (first.temperature, first.top_p, first.top_k) == (0.6, 0.9, 20)
    assert (second.temperature, second.top_p, second.top_k) == (0.0, 0.9, None)
    api.client().chat.completions.create(model=BASE, messages=[{"role": "user", "content": "x"}])
    assert api.engine.requests[2].sampling.max_tokens == 7
