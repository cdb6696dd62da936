"""Assembling choices, merging streams, sampling defaults: the parts of generation that need no server."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft_server.errors import ConfigError, InvalidRequest, Overloaded
from weft_server.protocol import ChoiceDelta, TokenLogprob
from weft_server.service.choice import ChoiceText, Echo
from weft_server.service.merge import merge
from weft_server.service.sampling import (
    GenerationDefaults,
    SamplingRequest,
    merge_sampling,
    read_generation_defaults,
)
from weft_server.service.tokenizer import Tokenizer

RELAXED = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class TestChoiceText:
    @RELAXED
    @given(
        ids=st.lists(st.integers(0, 310), min_size=1, max_size=20),
        cuts=st.lists(st.integers(0, 20), max_size=4),
        stop=st.lists(st.text("aeio ", min_size=1, max_size=2), max_size=2),
    )
    def test_the_answer_does_not_depend_on_how_tokens_are_grouped(
        self, byte_level: Tokenizer, ids: list[int], cuts: list[int], stop: list[str]
    ) -> None:
        def run(groups: list[list[int]]) -> tuple[str, list[tuple[str, int]], str | None, int]:
            choice = ChoiceText(byte_level, [], stop=stop, wants_logprobs=True)
            text, tokens, num_tokens = "", [], 0
            for position, group in enumerate(groups):
                reason = "length" if position == len(groups) - 1 else None
                logprobs = [TokenLogprob(token_id, -1.0) for token_id in group]
                output = choice.add(ChoiceDelta("", group, logprobs, reason))
                text += output.text
                tokens += [(token.text, token.text_offset) for token in output.tokens]
                num_tokens += output.num_tokens
                if output.finish_reason is not None:
                    return text, tokens, output.finish_reason, num_tokens
            raise AssertionError("unfinished")

        bounds = sorted({min(cut, len(ids)) for cut in cuts} | {0, len(ids)})
        groups = [ids[start:end] for start, end in itertools.pairwise(bounds)]
        one_by_one = run([[token_id] for token_id in ids])
        assert run(groups) == one_by_one
        whole = byte_level.decode(ids)
        assert whole.startswith(one_by_one[0])
        if one_by_one[2] == "length":
            assert one_by_one[0] == whole
            assert len(one_by_one[1]) == len(ids)

    def test_the_end_token_shows_neither_text_nor_logprob_but_counts(self, byte_level: Tokenizer) -> None:
        choice = ChoiceText(byte_level, [], wants_logprobs=True)
        ids = [*byte_level.encode("the sea"), 2]
        output = choice.add(ChoiceDelta("", ids, [TokenLogprob(i, -1.0) for i in ids], "stop"))
        assert output.text == "the sea"
        assert "".join(token.text for token in output.tokens) == "the sea"
        assert output.num_tokens == len(ids)

    def test_text_follows_the_prompt_without_losing_a_space(self, byte_fallback: Tokenizer) -> None:
        prompt, answer = byte_fallback.encode("hello"), byte_fallback.encode("a")
        output = ChoiceText(byte_fallback, prompt).add(ChoiceDelta("", answer, None, "length"))
        assert output.text == " a"

    def test_an_echoed_prompt_comes_with_the_first_delta_even_before_a_token(
        self, byte_level: Tokenizer
    ) -> None:
        ids, starts = byte_level.encode_with_offsets("the sea")
        choice = ChoiceText(byte_level, ids, wants_logprobs=True, echo=Echo("the sea", ids, starts))
        scored = [None, *(TokenLogprob(token_id, -2.0) for token_id in ids[1:])]
        first = choice.add(ChoiceDelta("", [], None, None, scored))
        second = choice.add(ChoiceDelta("", ids[:1], [TokenLogprob(ids[0], -1.0)], "length"))
        assert (first.text, [token.logprob for token in first.tokens]) == (
            "the sea",
            [None] + [-2.0] * (len(ids) - 1),
        )
        assert second.tokens[0].text_offset == len("the sea")

    def test_a_withheld_stop_beginning_is_shown_at_the_end(self, byte_level: Tokenizer) -> None:
        choice = ChoiceText(byte_level, [], stop=["sea!"])
        first = choice.add(ChoiceDelta("", byte_level.encode("the sea")))
        last = choice.add(ChoiceDelta("", [2], None, "stop"))
        assert (first.text, last.text, last.finish_reason) == ("the ", "sea", "stop")


class TestMerge:
    @staticmethod
    async def numbers(
        count: int, closed: list[int], *, error: Exception | None = None
    ) -> AsyncGenerator[int, None]:
        try:
            for number in range(count):
                yield number
                await asyncio.sleep(0)
            if error is not None:
                raise error
        finally:
            closed.append(count)

    def test_all_items_come_and_each_stream_keeps_its_order(self) -> None:
        closed: list[int] = []

        async def run() -> list[int]:
            streams = [self.numbers(count, closed) for count in (3, 50, 0)]
            return [item async for item in merge(streams)]

        items = asyncio.run(run())
        assert sorted(items) == sorted([*range(3), *range(50)])
        assert sorted(closed) == [0, 3, 50]

    def test_the_first_error_ends_the_merge_and_closes_the_rest(self) -> None:
        closed: list[int] = []

        async def run() -> None:
            streams = [self.numbers(1000, closed), self.numbers(2, closed, error=Overloaded("full"))]
            async with aclosing(merge(streams)) as merged:
                async for _ in merged:
                    pass

        with pytest.raises(Overloaded):
            asyncio.run(run())
        assert sorted(closed) == [2, 1000]

    @pytest.mark.parametrize("num_streams", [1, 3])
    def test_closing_early_closes_every_stream(self, num_streams: int) -> None:
        closed: list[int] = []

        async def run() -> None:
            streams = [self.numbers(1000, closed) for _ in range(num_streams)]
            async with aclosing(merge(streams)) as merged:
                await anext(merged)
                await anext(merged)

        asyncio.run(run())
        assert closed == [1000] * num_streams


class TestSampling:
    def test_defaults_come_from_the_models_file(self, tmp_path: Path) -> None:
        config = {
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "repetition_penalty": 1.05,
            "max_new_tokens": 99,
        }
        (tmp_path / "generation_config.json").write_text(json.dumps({**config, "do_sample": True}))
        expected = GenerationDefaults(0.7, 0.8, 20, 0.0, 1.05, 99)
        assert read_generation_defaults(tmp_path) == expected
        assert read_generation_defaults(tmp_path / "generation_config.json") == expected

    def test_without_a_file_they_are_openais(self, tmp_path: Path) -> None:
        assert read_generation_defaults(tmp_path) == GenerationDefaults()
        with pytest.raises(ConfigError):
            read_generation_defaults(tmp_path, required=True)

    def test_a_model_that_says_it_does_not_sample_is_greedy_by_default(self, tmp_path: Path) -> None:
        (tmp_path / "generation_config.json").write_text('{"do_sample": false, "top_k": 50}')
        assert read_generation_defaults(tmp_path).temperature == 0.0

    def test_keys_of_the_models_file_that_change_the_output_and_are_not_implemented_are_warned_of(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = {
            "num_beams": 4,
            "no_repeat_ngram_size": 3,
            "typical_p": 1.0,
            "min_length": None,
            "top_p": 0.5,
        }
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
        assert read_generation_defaults(tmp_path).top_p == 0.5
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "num_beams = 4, no_repeat_ngram_size = 3 would change" in record.getMessage()
        caplog.clear()
        neutral = {"num_beams": 1, "typical_p": 1, "bad_words_ids": [], "transformers_version": "5.0"}
        (tmp_path / "generation_config.json").write_text(json.dumps(neutral))
        read_generation_defaults(tmp_path)
        assert not caplog.records

    def test_every_neutral_value_of_transformers_is_neutral_here(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
        transformers.GenerationConfig().to_json_file(tmp_path / "generation_config.json", use_diff=False)
        read_generation_defaults(tmp_path)
        assert not caplog.records

    @pytest.mark.parametrize("text", ["{", "[]", '{"temperature": "hot"}', '{"top_p": 7}', '{"top_k": -5}'])
    def test_a_bad_file_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"generation_config\.json"):
            read_generation_defaults(tmp_path)

    def test_the_real_models_file_is_read(self, test_data: Path) -> None:
        assert read_generation_defaults(test_data / "models/tinystories-656k") == GenerationDefaults()

    def test_min_tokens_beyond_max_tokens_is_refused(self, byte_level: Tokenizer) -> None:
        with pytest.raises(InvalidRequest) as caught:
            merge_sampling(
                SamplingRequest(min_tokens=5),
                GenerationDefaults(),
                byte_level,
                max_tokens=4,
                vocab_size=300,
                seed=0,
                prompt_logprobs=None,
            )
        assert caught.value.param == "min_tokens"

    def test_an_end_token_that_the_model_cannot_produce_is_no_stop_token(self, byte_level: Tokenizer) -> None:
        end, *_ = byte_level.stop_ids

        def stop_ids(vocab_size: int) -> tuple[int, ...]:
            params = merge_sampling(
                SamplingRequest(stop_token_ids=(1,)),
                GenerationDefaults(),
                byte_level,
                max_tokens=4,
                vocab_size=vocab_size,
                seed=0,
                prompt_logprobs=None,
            )
            return params.stop_token_ids

        assert end in stop_ids(end + 1)
        assert end not in stop_ids(end)
        assert 1 in stop_ids(end)
