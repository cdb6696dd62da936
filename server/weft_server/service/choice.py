"""One choice's text: the engine's tokens become what a client may see.

Pure and synchronous: detokenization, stop strings, and log-probabilities aligned with the text. Knows nothing
of engines, HTTP or wire formats.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from weft_server.protocol import ChoiceDelta, FinishReason, TokenLogprob
from weft_server.service.detokenizer import StopMatcher, new_detokenizer
from weft_server.service.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that could have been drawn: printable text, UTF-8 bytes, log-probability."""

    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of the text. `logprob` is None for a prompt's first token, `top` is best first.

    `text_offset` counts characters from the start of the choice's text.
    """

    text: str
    raw: bytes
    logprob: float | None
    top: tuple[Candidate, ...]
    text_offset: int


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """News of one choice.

    `finish_reason` set means that it was the last. `num_tokens` counts generated tokens; `num_cached_tokens`
    comes once, first: those of the prompt that were cached.
    """

    idx: int
    text: str
    tokens: list[ScoredToken]
    num_tokens: int
    finish_reason: FinishReason | None
    num_cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt repeated in front of the answer: its text, its ids, and the character each id starts at."""

    text: str
    ids: list[int]
    starts: list[int]


class ChoiceText:
    """Assembles one choice from the engine's deltas."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        idx: int = 0,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        wants_logprobs: bool = False,
        echo: Echo | None = None,
    ) -> None:
        """
        Args:
            prompt: the ids that the answer follows.
            idx: the choice's index in its request.
            stop: strings that end the text and are not shown.
            min_tokens: stop strings are not looked for in fewer tokens.
            wants_logprobs: whether outputs carry `ScoredToken`s.
            echo: show this prompt first.
        """
        self._tokenizer = tokenizer
        self._idx = idx
        self._detokenizer = new_detokenizer(tokenizer, prompt)
        self._stops = StopMatcher(stop)
        self._min_tokens = min_tokens
        self._wants_logprobs = wants_logprobs
        self._echo = echo
        self._is_echoed = False
        self._waiting: deque[ScoredToken] = deque()
        self._num_tokens = 0
        self._num_decoded = 0
        self._num_shown = 0

    def add(self, delta: ChoiceDelta) -> ChoiceOutput:
        """Take a delta.

        The output may be empty (inside a character, or of what might become a stop string).
        """
        text, tokens = self._take_echo(delta)
        num_before = self._num_tokens
        for position, token_id in enumerate(delta.token_ids):
            self._num_tokens += 1
            is_last = position == len(delta.token_ids) - 1
            if is_last and delta.finish_reason == "stop":
                break
            text += self._push(token_id, delta.logprobs[position] if delta.logprobs else None)
            if self._stops.stopped:
                break
        if delta.finish_reason is not None:
            text += self._finish()
        finish_reason: FinishReason | None = "stop" if self._stops.stopped else delta.finish_reason
        tokens += self._release(everything=finish_reason is not None and not self._stops.stopped)
        num_tokens = self._num_tokens - num_before
        return ChoiceOutput(self._idx, text, tokens, num_tokens, finish_reason, delta.num_cached_tokens)

    def _finish(self) -> str:
        """What was withheld, unless a stop string has ended the text."""
        if self._stops.stopped:
            return ""
        text = self._show(self._detokenizer.flush())
        return text + self._shown(self._stops.flush())

    def _push(self, token_id: int, logprob: TokenLogprob | None) -> str:
        if self._wants_logprobs and logprob is not None:
            self._waiting.append(self._score(logprob, self._num_decoded))
        return self._show(self._detokenizer.push(token_id))

    def _show(self, text: str) -> str:
        self._num_decoded += len(text)
        if self._num_tokens < self._min_tokens:
            return self._shown(text)
        return self._shown(self._stops.push(text))

    def _shown(self, text: str) -> str:
        self._num_shown += len(text)
        return text

    def _release(self, *, everything: bool) -> list[ScoredToken]:
        """The tokens whose text has begun to show; those behind a stop string never do."""
        ready: list[ScoredToken] = []
        while self._waiting and (everything or self._waiting[0].text_offset - self._base < self._num_shown):
            ready.append(self._waiting.popleft())
        return ready

    @property
    def _base(self) -> int:
        return 0 if self._echo is None else len(self._echo.text)

    def _take_echo(self, delta: ChoiceDelta) -> tuple[str, list[ScoredToken]]:
        """The echoed prompt, in the first delta, which brings its logprobs."""
        if self._echo is None or self._is_echoed:
            return "", []
        self._is_echoed = True
        tokens: list[ScoredToken] = []
        for token_id, start, logprob in zip(
            self._echo.ids, self._echo.starts, delta.prompt_logprobs or (), strict=False
        ):
            if logprob is None:
                raw = self._tokenizer.token_bytes(token_id)
                tokens.append(ScoredToken(self._tokenizer.token_text(token_id), raw, None, (), start))
            else:
                tokens.append(self._score(logprob, start - self._base))
        return self._echo.text, tokens

    def _score(self, logprob: TokenLogprob, offset: int) -> ScoredToken:
        token = self._candidate(logprob.token_id, logprob.logprob)
        top = tuple(self._candidate(token_id, value) for token_id, value in logprob.top)
        return ScoredToken(token.text, token.raw, token.logprob, top, self._base + offset)

    def _candidate(self, token_id: int, logprob: float) -> Candidate:
        return Candidate(
            self._tokenizer.token_text(token_id),
            self._tokenizer.token_bytes(token_id),
            logprob if logprob >= LOWEST_LOGPROB else LOWEST_LOGPROB,
        )
