"""Incremental detokenization: tokens go in one by one, finished text comes out.

What comes out, concatenated and flushed, equals decoding all tokens at once behind the prompt; a character
cut by a token border is withheld until it is whole. Also owns stop strings. Knows nothing of requests or the
engine.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from weft_server.service.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_PROMPT_TAIL_TOKENS = 8


class Detokenizer(Protocol):
    """Turns a growing token sequence into text that is never taken back."""

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is final now (often empty inside a character)."""

    def flush(self) -> str:
        """The end: whatever is still withheld, an unfinished character as U+FFFD."""


def new_detokenizer(tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> Detokenizer:
    """A detokenizer for what follows `prompt`. Special tokens produce no text."""
    if tokenizer.is_byte_level:
        return ByteDetokenizer(tokenizer, prompt)
    return WindowDetokenizer(tokenizer, prompt)


class ByteDetokenizer:
    """For byte-level vocabularies, where text is the tokens' bytes: an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in prompt[-_PROMPT_TAIL_TOKENS:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        if token_id in self._tokenizer.special_ids:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any other decoder: decodes a short window twice, with and without the new tokens.

    The window starts with tokens whose text is already out, which absorb what the decoder does at a text's
    start. Byte-fallback tokens wait for the end of their run, because one bad byte changes how the whole run
    is decoded.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        shown = [token_id for token_id in prompt if token_id not in tokenizer.special_ids]
        start = max(0, len(shown) - _PROMPT_TAIL_TOKENS)
        while 0 < start < len(shown) and tokenizer.is_byte_token(shown[start]):
            start -= 1
        self._context = shown[start:]
        self._context_text = self._decode(self._context).rstrip(_REPLACEMENT)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id in self._tokenizer.special_ids or self._tokenizer.id_to_token(token_id) is None:
            return ""
        self._pending.append(token_id)
        if self._tokenizer.is_byte_token(token_id):
            return ""
        text = self._decode([*self._context, *self._pending])
        if self._tokenizer.cuts_characters and text.endswith(_REPLACEMENT):
            return ""
        return self._emit(text)

    def flush(self) -> str:
        if not self._pending:
            return ""
        return self._emit(self._decode([*self._context, *self._pending]))

    def _emit(self, text: str) -> str:
        new = text[len(self._context_text) :]
        self._context = self._pending
        self._context_text = self._decode(self._context)
        self._pending = []
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


class StopMatcher:
    """Ends a text before the first stop string, withholding only what might still become one.

    The string that is complete first wins, so the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """
        Args:
            stop: non-empty strings; none of them may appear in the text that is let through.
        """
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; returns what may be shown now. After a match (`stopped`) nothing more is let through."""
        if self.stopped or not self._stop:
            return "" if self.stopped else text
        text = self._held + text
        self._held = ""
        match = min(
            ((start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0),
            default=None,
        )
        if match is not None:
            self.stopped = True
            return text[: match[1]]
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """The end of the text: what was withheld is no stop string after all. Empty after a match."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        return next(
            (size for size in range(longest, 0, -1) if any(s.startswith(text[-size:]) for s in self._stop)), 0
        )
