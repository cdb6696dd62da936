"""Incremental detokenization equals decoding at once, whatever the tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from weft_server.service.detokenizer import StopMatcher, new_detokenizer
from weft_server.service.tokenizer import Tokenizer

SAMPLES = [
    "Once upon a time there was a little girl.",
    "Grüße, 你好，世界 🙂👩‍👩‍👧 and  double  spaces \n",
    " leading space",
    "hello a b  a hell o ",
]
RELAXED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = new_detokenizer(tokenizer, prompt or [])
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_text_streams_back_exactly(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("folder", ["models/tinystories-656k", "tokenizers/minimind", "tokenizers/gpt2"])
def test_random_tokens_of_real_vocabularies_stream_back_exactly(test_data: Path, folder: str) -> None:
    tokenizer = Tokenizer.from_directory(test_data / folder)
    check_random_ids(tokenizer)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_random_tokens_stream_back_exactly(kind: str, request: pytest.FixtureRequest) -> None:
    check_random_ids(request.getfixturevalue(kind))


def check_random_ids(tokenizer: Tokenizer) -> None:
    ids = st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=24)

    @RELAXED
    @given(ids)
    def alone(generated: list[int]) -> None:
        assert "".join(stream(tokenizer, generated)) == tokenizer.decode(generated)

    @RELAXED
    @given(ids, st.sampled_from(SAMPLES))
    def behind_a_prompt(generated: list[int], text: str) -> None:
        prompt = tokenizer.encode(text)
        # A byte token behind a prompt's run of byte tokens may spoil characters that are out already.
        assume(not tokenizer.is_byte_token(prompt[-1]))
        whole = tokenizer.decode([*prompt, *generated])
        assert tokenizer.decode(prompt) + "".join(stream(tokenizer, generated, prompt)) == whole

    alone()
    behind_a_prompt()


def test_real_story_tokens_that_merge_across_spaces_stream_back_exactly(test_data: Path) -> None:
    tokenizer = Tokenizer.from_directory(test_data / "models/tinystories-656k")
    prompt = [1, 80, 147, 201, 282, 215, 286, 1890]
    ids = "1205 1161 81 77 809 89 67 555 163 436 1432 309 1432 81 251 796 615 242 328 552 319 1283 149 1243"
    story = [int(token) for token in ids.split()]
    text = "".join(stream(tokenizer, story, prompt))
    assert "Once upon a time, there was a little girl" + text == tokenizer.decode([*prompt, *story])


def test_a_character_cut_by_tokens_comes_when_it_is_whole(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("🦜")
    pieces = stream(byte_level, ids)
    assert pieces[len(ids) - 1 :] == ["🦜", ""]
    assert set(pieces[: len(ids) - 1]) == {""}


def test_a_generation_cut_inside_a_character_ends_with_the_replacement_character(
    byte_level: Tokenizer,
) -> None:
    assert stream(byte_level, byte_level.encode("🦜")[:-1])[-1] == "\ufffd"


def test_text_goes_on_behind_a_prompt_that_ends_with_byte_tokens(byte_fallback: Tokenizer) -> None:
    prompt = byte_fallback.encode("hello 你")
    continuation = byte_fallback.token_to_id("<0x80>")
    assert continuation is not None
    pieces = stream(byte_fallback, [continuation, *byte_fallback.encode("hello a")], prompt)
    assert pieces[-2] != ""
    assert "".join(pieces).endswith(" hello a")
    assert "".join(stream(byte_fallback, byte_fallback.encode("好 a")[1:], prompt)) == "好 a"


def test_special_tokens_show_no_text(byte_level: Tokenizer) -> None:
    end = byte_level.eos_token_id
    assert end is not None
    assert stream(byte_level, [*byte_level.encode("a"), end, *byte_level.encode("b")])[-3:] == ["", "b", ""]


def test_long_runs_of_invalid_bytes_cost_linear_time(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    calls = 0
    decode = byte_fallback.decode

    def counted(ids: list[int], **options: bool) -> str:
        nonlocal calls
        calls += len(ids)
        return decode(ids, **options)

    continuation = byte_fallback.token_to_id("<0x80>")
    assert continuation is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_fallback, "decode", counted)
        text = "".join(stream(byte_fallback, [continuation] * 4000))
    assert text == "\ufffd" * 4000
    assert calls < 20_000


class TestStopStrings:
    def test_the_text_ends_before_a_stop_string_cut_across_pieces(self) -> None:
        matcher = StopMatcher(["\n\nHuman:"])
        shown = [matcher.push(piece) for piece in ["Hi.", "\n", "\nHu", "man", ": x", "more"]]
        assert "".join(shown) == "Hi."
        assert matcher.stopped
        assert matcher.flush() == ""

    def test_what_only_looked_like_a_stop_string_is_shown(self) -> None:
        matcher = StopMatcher(["END"])
        shown = [matcher.push(piece) for piece in ["E", "N", "E", "ND?"]]
        assert shown == ["", "", "EN", ""]
        assert matcher.stopped
        matcher = StopMatcher(["END"])
        assert [matcher.push("xE"), matcher.push("N"), matcher.flush()] == ["x", "", "EN"]

    @settings(max_examples=300, deadline=None)
    @given(
        st.text("ab", max_size=30),
        st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
        st.data(),
    )
    def test_the_result_does_not_depend_on_the_pieces(
        self, text: str, stop: list[str], data: st.DataObject
    ) -> None:
        whole = StopMatcher(stop)
        expected = whole.push(text) + whole.flush()
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
        matcher = StopMatcher(stop)
        shown = ""
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            shown += matcher.push(text[start:end])
            assert expected.startswith(shown)
        assert shown + matcher.flush() == expected
        assert matcher.stopped == whole.stopped == any(entry in text for entry in stop)
        assert not any(entry in expected for entry in stop)
