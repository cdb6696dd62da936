"""Training files: what is refused, and that what is trained is exactly what is served."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load
from tokenizers import processors

from weft_server.service.dataset_lines import LineError, parse_line, split_lines
from weft_server.service.datasets import (
    DatasetAbandonedError,
    DatasetError,
    TokenizedDataset,
    tokenize_dataset,
    tokenize_example,
)
from weft_server.service.tokenizer import Tokenizer
from weft_server.store.disk import DiskBlobStore

Tokenize = Callable[..., tuple[TokenizedDataset, dict[str, np.ndarray]]]


@pytest.fixture
def blobs(tmp_path: Path) -> DiskBlobStore:
    return DiskBlobStore(tmp_path / "blobs")


@pytest.fixture
def tokenize(blobs: DiskBlobStore, tokenizer: Tokenizer) -> Tokenize:
    def call(data: bytes | Iterable[Any], **changes: Any) -> tuple[TokenizedDataset, dict[str, np.ndarray]]:
        if not isinstance(data, bytes):
            data = "".join(json.dumps(row) + "\n" for row in data).encode()
        options = {"max_seq_length": 200, "overlength": "error", "cancelled": lambda: False} | changes
        dataset = tokenize_dataset(blobs, blobs.put([data]), tokenizer, **options)
        return dataset, load(blobs.read_bytes(dataset.blob))

    return call


@pytest.fixture(scope="session")
def test_data() -> Path:
    folder = os.environ.get("WEFT_TEST_DATA")
    if not folder:
        pytest.skip("WEFT_TEST_DATA is not set: the real tokenizers and chat templates are missing")
    return Path(folder)


def _chat(*turns: str, **changes: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[idx % 2], "content": content} for idx, content in enumerate(turns)]
    messages[-1] |= changes
    return {"messages": messages}


def _targets(example: Any) -> list[int]:
    return [token for token, target in zip(example.tokens, example.targets, strict=True) if target]


def _only(value: Any, tokenizer: Tokenizer) -> Any:
    (example,) = tokenize_example(parse_line(1, json.dumps(value).encode()), tokenizer)
    assert len(example.tokens) == len(example.targets)
    assert not example.targets[0]
    return example


# ---------------------------------------------------------------- tokens and targets


def test_a_conversation_trains_the_assistants_words_and_their_end(tokenizer: Tokenizer) -> None:
    example = _only(_chat("count to one", "one", "and two", "two"), tokenizer)
    text = tokenizer.decode(example.tokens, skip_special_tokens=False)
    assert text == (
        "<|im_start|>user\ncount to one<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
        "<|im_start|>user\nand two<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>"
    )
    assert tokenizer.decode(_targets(example), skip_special_tokens=False) == "one<|im_end|>two<|im_end|>"


def test_what_precedes_the_targets_is_what_chat_would_be_served(tokenizer: Tokenizer) -> None:
    example = _only(_chat("count to three", "\n\none two three"), tokenizer)
    served = tokenizer.encode_chat([{"role": "user", "content": "count to three"}])
    assert example.tokens[: len(served)] == served
    assert not any(example.targets[: len(served)])
    assert all(example.targets[len(served) :])


def test_a_message_of_weight_0_is_context_only(tokenizer: Tokenizer) -> None:
    value = _chat("a", "one", "b", "two")
    value["messages"][1]["weight"] = 0
    value["messages"][3]["weight"] = 1
    assert tokenizer.decode(_targets(_only(value, tokenizer))) == "two"


def test_parts_names_and_the_developer_role_are_read_as_chat_reads_them(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    value = {
        "messages": [
            {"role": "developer", "content": "be brief", "name": "ops"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "one", "tool_calls": [], "refusal": None},
        ]
    }
    text = tokenizer.decode(_only(value, tokenizer).tokens, skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na\nb<|im_end|>")


def test_a_completion_follows_its_prompt_and_ends(tokenizer: Tokenizer) -> None:
    example = _only({"prompt": "count to", "completion": " three"}, tokenizer)
    prompt, completion = tokenizer.encode("count to"), tokenizer.encode(" three")
    assert example.tokens == [*prompt, *completion, tokenizer.eos_token_id]
    assert _targets(example) == [*completion, tokenizer.eos_token_id]


def test_a_completion_that_follows_nothing_is_refused_as_serving_refuses_its_prompt(
    tokenize: Tokenize,
) -> None:
    rows = [{"prompt": "count to", "completion": " three"}, {"prompt": "", "completion": "one two three"}]
    with pytest.raises(DatasetError, match=r"Line 2: the prompt has no tokens"):
        tokenize(rows)


def test_an_answer_that_a_template_puts_behind_nothing_is_refused(tokenizer: Tokenizer) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    bare = Tokenizer(tokenizer._backend, special_tokens=tokenizer.special_tokens, chat_template=template)
    line = json.dumps({"messages": [{"role": "assistant", "content": "one two three"}]}).encode()
    with pytest.raises(LineError, match=r"the text before messages\[0\] has no tokens"):
        tokenize_example(parse_line(1, line), bare)


def test_with_a_bos_an_empty_prompt_trains_the_whole_completion(tokenizer: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    bos = tokenizer.eos_token_id
    assert bos is not None
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_end|> $A", special_tokens=[("<|im_end|>", bos)]
    )
    with_bos = Tokenizer(backend, special_tokens=tokenizer.special_tokens)
    example = _only({"prompt": "", "completion": "one two"}, with_bos)
    assert _targets(example) == example.tokens[1:]


def test_of_plain_text_all_but_the_first_token_is_trained(tokenizer: Tokenizer) -> None:
    example = _only({"text": "count to three"}, tokenizer)
    assert example.tokens == [*tokenizer.encode("count to three"), tokenizer.eos_token_id]
    assert _targets(example) == example.tokens[1:]


def test_an_end_token_that_the_text_has_already_is_not_doubled(tokenizer: Tokenizer) -> None:
    assert _only({"text": "one<|im_end|>"}, tokenizer).tokens.count(tokenizer.eos_token_id) == 1


REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}{{ m.content }}"
    "{% else %}{{ m.content.split('=')[-1] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_history_makes_one_example_per_turn(tokenizer: Tokenizer) -> None:
    rewriting = Tokenizer(
        tokenizer._backend, special_tokens=tokenizer.special_tokens, chat_template=REASONING
    )
    line = json.dumps(_chat("a", "think=one", "b", "think=two")).encode()
    first, second = tokenize_example(parse_line(3, line), rewriting)
    assert first.line == second.line == 3
    assert rewriting.decode(_targets(first)) == "think=one"
    assert rewriting.decode(_targets(second)) == "think=two"
    served = rewriting.encode_chat(_chat("a", "think=one", "b")["messages"])
    assert second.tokens[: len(served)] == served


def test_a_template_without_an_end_behind_the_last_turn_still_trains_one(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    bare = Tokenizer(tokenizer._backend, special_tokens=tokenizer.special_tokens, chat_template=template)
    example = _only(_chat("a", "one"), bare)
    assert bare.decode(_targets(example), skip_special_tokens=False) == "one<|im_end|>"


def test_tokens_equal_those_of_transformers_chat_template(test_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    directory = test_data / "tokenizers" / "minimind"
    oracle = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer = Tokenizer.from_directory(directory)
    for turns in (
        ("What is 2+2?", "It is 4."),
        ("你好", "你好！有什么可以帮你？", "再见", "再见 🙂"),
        ("a\n\nb ", "trailing  ", "x", "y\n"),
    ):
        value = _chat(*turns)
        example = _only(value, tokenizer)
        ids = oracle.apply_chat_template(value["messages"], tokenize=True, return_dict=False)
        # The template puts a newline behind the last end token, which is never generated.
        assert ids[: len(example.tokens)] == example.tokens
        assert oracle.decode(ids[len(example.tokens) :]) == "\n"
        for idx in range(1, len(turns), 2):
            prompt = oracle.apply_chat_template(
                value["messages"][:idx], add_generation_prompt=True, tokenize=True, return_dict=False
            )
            assert example.tokens[: len(prompt)] == prompt
            assert example.targets[len(prompt)]
            assert not example.targets[len(prompt) - 1]


def test_whitespace_that_would_merge_with_the_prompt_is_tokenized_as_generated(test_data: Path) -> None:
    tokenizer = Tokenizer.from_directory(test_data / "tokenizers" / "minimind")
    value = _chat("a", "  one  ", "b", "two")
    examples = tokenize_example(parse_line(1, json.dumps(value).encode()), tokenizer)
    assert len(examples) == 2
    for example, idx in zip(examples, (1, 3), strict=True):
        served = tokenizer.encode_chat(value["messages"][:idx])
        assert example.tokens[: len(served)] == served
        text = tokenizer.decode(example.tokens[len(served) :], skip_special_tokens=False)
        assert text == value["messages"][idx]["content"] + "<|im_end|>"


def test_a_completion_reads_on_without_a_second_space_where_the_tokenizer_prepends_one(
    test_data: Path,
) -> None:
    tokenizer = Tokenizer.from_directory(test_data / "models" / "tinystories-656k")
    for prompt, completion in (
        ("Once upon a time", " there was a cat."),
        ("Once upon a time, there was a little girl", " named Lily."),
        ("Once upon a ti", "me there was a dog"),
        ("", "Once upon a time"),
    ):
        example = _only({"prompt": prompt, "completion": completion}, tokenizer)
        assert tokenizer.decode(example.tokens) == prompt + completion
        assert example.tokens[0] == tokenizer.token_to_id(tokenizer.special_tokens["bos_token"])
        assert example.tokens[-1] == tokenizer.eos_token_id
        served = tokenizer.encode(prompt)
        if prompt and completion.startswith(" "):
            assert example.tokens[: len(served)] == served
            assert not any(example.targets[: len(served)])


# ---------------------------------------------------------------- the blob


def test_the_dataset_blob_holds_every_example_with_its_line(tokenize: Tokenize, tokenizer: Tokenizer) -> None:
    rows = [_chat("a", "one"), _chat("count to two", "one two", "b", "three")]
    data = ("\ufeff" + json.dumps(rows[0]) + "\r\n\r\n  \n" + json.dumps(rows[1])).encode()
    dataset, arrays = tokenize(data)
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        "tokens": "int32",
        "targets": "uint8",
        "offsets": "int64",
        "lines": "int32",
    }
    assert arrays["lines"].tolist() == [1, 4]
    expected = [_only(row, tokenizer) for row in rows]
    offsets = arrays["offsets"].tolist()
    assert offsets == [0, len(expected[0].tokens), dataset.num_tokens]
    for idx, example in enumerate(expected):
        span = slice(offsets[idx], offsets[idx + 1])
        assert arrays["tokens"][span].tolist() == example.tokens
        assert arrays["targets"][span].tolist() == [int(target) for target in example.targets]
    assert (dataset.num_examples, dataset.num_target_tokens) == (2, int(arrays["targets"].sum()))


def test_lines_are_split_alike_however_the_bytes_arrive() -> None:
    data = b"\xef\xbb\xbfone\r\n\n two\n\r\nthree"
    expected = [(1, b"one"), (3, b" two"), (5, b"three")]
    for size in (1, 2, 3, 7, 100):
        assert list(split_lines(data[idx : idx + size] for idx in range(0, len(data), size))) == expected


def test_an_overlong_example_fails_with_its_line_its_length_and_the_remedy(tokenize: Tokenize) -> None:
    rows = [{"text": "one"}, {"text": "one " * 60}]
    with pytest.raises(DatasetError, match=r"Line 2: \d+ tokens.*50.*weft.max_seq_length.*truncate.*drop"):
        tokenize(rows, max_seq_length=50)


def test_overlong_examples_are_truncated_or_dropped_when_asked(tokenize: Tokenize) -> None:
    rows = [{"text": "one"}, {"text": "one " * 60}, {"prompt": "", "completion": ""}]
    dataset, arrays = tokenize(rows[:2], max_seq_length=50, overlength="truncate")
    assert (dataset.num_examples, dataset.num_truncated, dataset.num_dropped) == (2, 1, 0)
    assert np.diff(arrays["offsets"]).max() == 50
    dataset, arrays = tokenize(rows[:2], max_seq_length=50, overlength="drop")
    assert (dataset.num_examples, dataset.num_truncated, dataset.num_dropped) == (1, 0, 1)
    assert arrays["lines"].tolist() == [1]


def test_an_example_that_truncation_leaves_without_targets_is_reported_as_that(
    tokenize: Tokenize,
) -> None:
    rows = [{"prompt": "count " * 60, "completion": " one"}, {"prompt": "a", "completion": "b"}]
    dataset, arrays = tokenize(rows, max_seq_length=50, overlength="truncate")
    assert (dataset.num_examples, dataset.num_truncated, dataset.num_dropped) == (1, 0, 0)
    assert dataset.num_without_targets == 1
    assert arrays["lines"].tolist() == [2]
    with pytest.raises(DatasetError, match="All 1 examples were truncated to 50 tokens, which left nothing"):
        tokenize(rows[:1], max_seq_length=50, overlength="truncate")


def test_nobody_waits_for_a_file_whose_job_was_cancelled(tokenize: Tokenize) -> None:
    with pytest.raises(DatasetAbandonedError):
        tokenize([{"text": "one"}], cancelled=lambda: True)


# ---------------------------------------------------------------- refusals

REFUSED = [
    (b"{", "not JSON: .* column 2"),
    (b"[1]", "a JSON array; a line must be an object"),
    (b'"x"', "a JSON string"),
    (b'{"text": "\xff"}', r"not UTF-8 \(byte 11"),
    (b"[" * 100_000, "not JSON|nested too deeply"),
    (b'{"text": "\\ud800"}', "surrogate"),
    ("{}".encode("utf-16"), "not UTF-8"),
    ({}, "the keys are none"),
    ({"text": "a", "prompt": "b"}, "the keys are prompt, text"),
    ({"prompt": "a"}, "the keys are prompt"),
    ({"question": "a", "answer": "b"}, "the keys are answer, question"),
    ({"text": ""}, '"text" is empty'),
    ({"text": 3}, "text is a JSON number; it must be a string"),
    ({"text": None}, "text is a JSON null"),
    ({"prompt": "a", "completion": ""}, '"completion" is empty'),
    ({"prompt": ["a"], "completion": "b"}, "prompt is a JSON array"),
    ({"prompt": "a", "completion": True}, "completion is a JSON boolean"),
    ({"messages": []}, '"messages" is empty'),
    ({"messages": "hi"}, '"messages" is a JSON string'),
    ({"messages": ["hi"]}, r"messages\[0\] is a JSON string"),
    ({"messages": [{"role": "bot", "content": "x"}]}, r'messages\[0\].role is "bot"'),
    ({"messages": [{"content": "x"}]}, r"messages\[0\].role is null"),
    ({"messages": [{"role": "tool", "content": "x"}]}, r'role is "tool"'),
    ({"messages": [{"role": "user", "content": "x"}]}, "no message has the role assistant"),
    (_chat("a", "one", weight=0), "every assistant message has weight 0"),
    (_chat("a", "one", weight=2), "weight is 2; it must be 0 or 1"),
    (_chat("a", "one", weight=True), "weight is true"),
    (_chat("a", "one", content=None), r"messages\[1\].content is a JSON null"),
    (_chat("a", "one", tool_calls=[{"id": "x"}]), r'messages\[1\] has the key "tool_calls"'),
    (_chat("a", "one", content=[{"type": "image_url"}]), r"content\[0\] must be"),
    ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "only assistant messages have one"),
    ({**_chat("a", "one"), "tools": [{"type": "function"}]}, '"tools" is not supported'),
    ({**_chat("a", "one"), "functions": [{}]}, '"functions" is not supported'),
    ({**_chat("a", "one"), "rejected": "x"}, "the keys are messages, rejected"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED)
def test_a_bad_line_is_refused_with_its_number_and_the_reason(
    tokenize: Tokenize, line: Any, message: str
) -> None:
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    with pytest.raises(LineError, match=message):
        parse_line(1, raw)
    if b"\n" not in raw:
        with pytest.raises(DatasetError, match=r"^Line 3: "):
            tokenize(b'{"text": "fine"}\n\n' + raw + b"\n")


def test_idle_fields_beside_a_conversation_are_accepted(tokenizer: Tokenizer) -> None:
    _only({**_chat("a", "one"), "tools": [], "parallel_tool_calls": False}, tokenizer)


def test_a_file_of_two_formats_is_refused_where_the_second_begins(tokenize: Tokenize) -> None:
    with pytest.raises(DatasetError, match="Line 2: its format is messages, but the file began with text"):
        tokenize([{"text": "one"}, _chat("a", "one")])


def test_several_bad_lines_are_reported_at_once(tokenize: Tokenize) -> None:
    with pytest.raises(DatasetError) as caught:
        tokenize(b"x\n" * 9)
    message = str(caught.value)
    assert [f"Line {number}:" in message for number in range(1, 8)] == [True] * 5 + [False] * 2
    assert "Later lines were not checked" in message


@pytest.mark.parametrize("data", [b"", b"\n\r\n  \n"])
def test_a_file_without_examples_is_refused(tokenize: Tokenize, data: bytes) -> None:
    with pytest.raises(DatasetError, match="holds no examples"):
        tokenize(data)


def test_conversations_without_a_chat_template_are_refused_with_the_remedy(tokenizer: Tokenizer) -> None:
    bare = Tokenizer(tokenizer._backend, special_tokens=tokenizer.special_tokens)
    with pytest.raises(LineError, match=r"no chat template.*--chat-template"):
        tokenize_example(parse_line(1, json.dumps(_chat("a", "one")).encode()), bare)


def test_what_the_chat_template_refuses_is_the_lines_error(tokenizer: Tokenizer) -> None:
    strict = Tokenizer(
        tokenizer._backend,
        special_tokens=tokenizer.special_tokens,
        chat_template="{{ raise_exception('roles must alternate') }}",
    )
    with pytest.raises(LineError, match="roles must alternate"):
        tokenize_example(parse_line(1, json.dumps(_chat("a", "one")).encode()), strict)
