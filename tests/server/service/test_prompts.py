"""Prompts that do not fit cost nothing, and long ones hold nobody up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from weft_server.errors import ContextLengthExceeded, InvalidRequest
from weft_server.service.choice import Echo
from weft_server.service.prompts import MAX_ENCODING_THREADS, PromptEncoder, PromptInput
from weft_server.service.tokenizer import Tokenizer

RELAXED = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class WatchedTokenizer(Tokenizer):
    """Calls `on_encode` whenever a text is encoded, and counts the ids that are decoded."""

    def __init__(self, backend: tokenizers.Tokenizer, on_encode: Callable[[str], None]) -> None:
        super().__init__(backend, chat_template="{{ messages[0]['content'] }}")
        self._on_encode = on_encode
        self.num_decoded = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self._on_encode(text)
        return super().encode(text, add_special_tokens=add_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        self.num_decoded += 1
        return super().token_bytes(token_id)


def letters(normalizer: tokenizers.normalizers.Normalizer | None = None) -> tokenizers.Tokenizer:
    """One token a byte, and `abcd` as the longest."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "cd", "abcd"]
    vocab = {piece: idx for idx, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b"), ("c", "d"), ("ab", "cd")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


def refuse(text: str) -> None:
    raise AssertionError(f"{len(text)} characters were encoded")


def encode(
    tokenizer: Tokenizer, prompts: Sequence[PromptInput], *, with_echo: bool = False, num_new_tokens: int = 1
) -> list[Echo]:
    return asyncio.run(
        PromptEncoder(tokenizer).encode(
            "tenant",
            prompts,
            num_new_tokens=num_new_tokens,
            max_model_len=10,
            vocab_size=300,
            with_echo=with_echo,
        )
    )


def test_text_that_cannot_fit_is_refused_by_its_characters_without_encoding_it() -> None:
    with pytest.raises(ContextLengthExceeded, match=r"40 characters.* has 41 characters") as caught:
        encode(WatchedTokenizer(letters(), refuse), ["a" * 41])
    assert caught.value.param == "prompt"


def test_text_that_may_fit_is_judged_by_its_tokens() -> None:
    tokenizer = Tokenizer(letters())
    assert len(encode(tokenizer, ["abcd" * 9])[0].ids) == 9
    with pytest.raises(ContextLengthExceeded, match="11 tokens"):
        encode(tokenizer, ["abcd" * 10])


def test_a_conversation_that_cannot_fit_is_refused_without_encoding_it() -> None:
    encoder = PromptEncoder(WatchedTokenizer(letters(), refuse))
    messages = [{"role": "user", "content": "a" * 5000}]
    with pytest.raises(ContextLengthExceeded, match="5000 characters") as caught:
        asyncio.run(encoder.encode_chat("tenant", messages, max_model_len=10))
    assert caught.value.param == "messages"


def test_too_many_token_ids_are_refused_before_any_is_looked_at() -> None:
    tokenizer = WatchedTokenizer(letters(), refuse)
    with pytest.raises(ContextLengthExceeded, match="11 tokens"):
        encode(tokenizer, [[10**9] * 10], with_echo=True)
    with pytest.raises(InvalidRequest, match="token id 1000000000"):
        encode(tokenizer, [[10**9] * 9], with_echo=True)
    assert tokenizer.num_decoded == 0


def test_token_ids_are_decoded_only_to_be_shown() -> None:
    tokenizer = WatchedTokenizer(letters(), refuse)
    assert encode(tokenizer, [[1, 2, 3]])[0].ids == [1, 2, 3]
    assert tokenizer.num_decoded == 0
    assert encode(tokenizer, [[1, 2, 3]], with_echo=True)[0].text == tokenizer.decode([1, 2, 3])


@RELAXED
@given(text=st.text(min_size=1, max_size=60))
def test_no_text_has_more_characters_than_its_tokens_can_stand_for(
    byte_level: Tokenizer, byte_fallback: Tokenizer, text: str
) -> None:
    composing = Tokenizer(letters(normalizers.NFC()))
    for tokenizer in (byte_level, byte_fallback, composing):
        assert len(text) <= len(tokenizer.encode(text)) * tokenizer.max_chars_per_token


def test_encoding_a_long_text_lets_other_threads_run(byte_level: Tokenizer) -> None:
    text = "Once upon a time there was a girl. " * 20_000
    ticks_while: list[tuple[str, int]] = []
    for name, work in (
        ("encode", lambda: byte_level.encode(text)),
        ("encode_with_offsets", lambda: byte_level.encode_with_offsets(text)[0]),
    ):
        thread = threading.Thread(target=work)
        thread.start()
        num_ticks = 0
        while thread.is_alive():
            time.sleep(0.001)
            num_ticks += 1
        ticks_while.append((name, num_ticks))
    assert all(num_ticks > 10 for _, num_ticks in ticks_while), ticks_while


def test_long_prompts_take_few_threads_and_a_tenant_takes_one() -> None:
    lock = threading.Lock()
    running: list[str] = []
    most: list[list[str]] = []
    both = threading.Barrier(MAX_ENCODING_THREADS)

    def enter(text: str) -> None:
        with lock:
            running.append(text[0])
            most.append(list(running))
        if text[-1] == "!":
            both.wait(20)
        with lock:
            running.remove(text[0])

    encoder = PromptEncoder(WatchedTokenizer(letters(), enter))

    async def run() -> None:
        first, later = "{}" + "x" * 5000 + "!", "{}" + "x" * 5000
        texts = [
            first.format("a"),
            later.format("a"),
            first.format("b"),
            later.format("b"),
            later.format("c"),
        ]
        await asyncio.gather(
            *(
                encoder.encode(
                    text[0],
                    [text],
                    num_new_tokens=1,
                    max_model_len=10_000,
                    vocab_size=300,
                    with_echo=False,
                )
                for text in texts
            )
        )

    asyncio.run(run())
    assert max(map(len, most)) == MAX_ENCODING_THREADS
    assert all(len(set(tenants)) == len(tenants) for tenants in most)
