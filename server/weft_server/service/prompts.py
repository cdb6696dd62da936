"""Prompts become token ids: within the context, off the event loop when long, and in fair turns.

Owns the refusal of prompts that do not fit, the earlier the cheaper: token ids by their number, before they
are looked at; text by its characters, before it is tokenized. Knows nothing of sampling or the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar
from weakref import WeakValueDictionary

from weft_server.errors import ContextLengthExceeded, InvalidRequest
from weft_server.service.choice import Echo
from weft_server.service.detokenizer import new_detokenizer
from weft_server.service.tokenizer import Tokenizer

T = TypeVar("T")
PromptInput: TypeAlias = str | Sequence[int]

MAX_ENCODING_THREADS = 2
_THREAD_THRESHOLD_CHARS = 4096


class PromptEncoder:
    """Encodes prompts. Long ones in a few threads of its own, one at a time for each tenant.

    So many long prompts at once take neither every thread nor memory for all of them, and those of one tenant
    delay another tenant's by one prompt at most.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(MAX_ENCODING_THREADS, thread_name_prefix="encode")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def encode(
        self,
        tenant: str,
        prompts: Sequence[PromptInput],
        *,
        num_new_tokens: int,
        max_model_len: int,
        vocab_size: int,
        with_echo: bool,
    ) -> list[Echo]:
        """The prompts of one completion request.

        Args:
            prompts: texts (encoded with the tokenizer's special tokens) or token ids (used as they are).
            num_new_tokens: what each prompt must leave room for.
            max_model_len: the context.
            vocab_size: ids that the model has.
            with_echo: whether the prompts are shown; otherwise text and starts of what is returned are empty.

        Raises:
            InvalidRequest: an empty prompt, or ids outside the vocabulary.
            ContextLengthExceeded: a prompt plus its new tokens does not fit.
        """
        for prompt in prompts:
            if isinstance(prompt, str):
                self._check_characters(len(prompt), max_model_len, "prompt")
            else:
                check_context(len(prompt), num_new_tokens, max_model_len, "prompt")

        def encode_all() -> list[Echo]:
            found: list[Echo] = []
            for prompt in prompts:
                encoded = self._encode(prompt, vocab_size, with_echo=with_echo)
                if not encoded.ids:
                    raise InvalidRequest("The prompt is empty.", param="prompt", code="empty_prompt")
                check_context(len(encoded.ids), num_new_tokens, max_model_len, "prompt")
                found.append(encoded)
            return found

        return await self._in_thread_if_long(sum(map(len, prompts)), tenant, encode_all)

    async def encode_chat(
        self,
        tenant: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_model_len: int,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a rendered conversation, up to and including the opening of the answer.

        Raises:
            InvalidRequest: there is no chat template, it refuses the messages, or renders them to nothing.
            ContextLengthExceeded: the text is longer than any that fits; whether its ids fit is not checked.
        """
        num_chars = sum(len(str(message.get("content"))) for message in messages)
        text = await self._in_thread_if_long(
            num_chars, tenant, lambda: self._tokenizer.render_chat(messages, variables=template_variables)
        )
        self._check_characters(len(text), max_model_len, "messages")
        ids = await self._in_thread_if_long(
            len(text), tenant, lambda: self._tokenizer.encode(text, add_special_tokens=False)
        )
        if not ids:
            raise InvalidRequest(
                "The messages render to an empty prompt.", param="messages", code="empty_prompt"
            )
        return ids

    def _encode(self, prompt: PromptInput, vocab_size: int, *, with_echo: bool) -> Echo:
        if isinstance(prompt, str):
            if with_echo:
                return Echo(prompt, *self._tokenizer.encode_with_offsets(prompt))
            return Echo("", self._tokenizer.encode(prompt), [])
        for token_id in prompt:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(
                    f"'prompt' has the token id {token_id}; this model's ids are 0 to {vocab_size - 1}.",
                    param="prompt",
                    code="invalid_value",
                )
        ids = list(prompt)
        return self._decode_prompt(ids) if with_echo else Echo("", ids, [])

    def _decode_prompt(self, ids: list[int]) -> Echo:
        detokenizer = new_detokenizer(self._tokenizer)
        parts: list[str] = []
        starts: list[int] = []
        num_chars = 0
        for token_id in ids:
            starts.append(num_chars)
            parts.append(detokenizer.push(token_id))
            num_chars += len(parts[-1])
        parts.append(detokenizer.flush())
        return Echo("".join(parts), ids, starts)

    def _check_characters(self, num_chars: int, max_model_len: int, param: str) -> None:
        max_chars = max_model_len * self._tokenizer.max_chars_per_token
        if num_chars > max_chars:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {max_model_len} tokens, and no text of more than "
                f"{max_chars} characters can fit. However, the {param} has {num_chars} characters. "
                f"Reduce the length of the {param}.",
                param=param,
            )

    async def _in_thread_if_long(self, num_chars: int, tenant: str, work: Callable[[], T]) -> T:
        """Long prompts take milliseconds to seconds, mostly in code that releases the interpreter lock."""
        if num_chars <= _THREAD_THRESHOLD_CHARS:
            return work()
        async with self._turns.setdefault(tenant, asyncio.Lock()):
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def check_context(num_prompt: int, max_tokens: int, max_model_len: int, param: str) -> None:
    """Raise ContextLengthExceeded unless prompt and completion fit the context together."""
    if num_prompt + max_tokens <= max_model_len:
        return
    raise ContextLengthExceeded(
        f"This model's maximum context length is {max_model_len} tokens. However, you requested "
        f"{num_prompt + max_tokens} tokens ({num_prompt} in the {param}, {max_tokens} in the completion). "
        f"Reduce the length of the {param} or of the completion.",
        param=param,
    )
