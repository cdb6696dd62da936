"""One choice being generated, as the engine keeps it: tokens and sampling state. Scheduling state is the
scheduler's."""

from __future__ import annotations

from dataclasses import dataclass, field

from weft_server.engine.history import TokenHistory
from weft_server.protocol import SamplingParams, TokenLogprob


@dataclass(slots=True)
class Sequence:
    """Tokens of one request choice.

    `prompt` and `output` are what is known on the host: `output` begins with what was sent before an engine
    restart and grows when an iteration's results are collected, so it may be one token ahead of what has been
    told. `adapter` is a digest. `last_token_row` is its place in the device's buffer of newest tokens.
    `num_prompt_logprobs` counts those of `prompt_logprobs` and those still on their way to the host;
    `history` is there from the first sampled token on, if sampling looks at it.
    """

    request_id: str
    prompt: list[int]
    params: SamplingParams
    choice_idx: int
    adapter: str | None = None
    last_token_row: int | None = None
    output: list[int] = field(default_factory=list)
    has_told: bool = False
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    history: TokenHistory | None = None

    def take_prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        """The prompt's log-probabilities for the first delta, None for all later ones or if not asked for."""
        is_first, self.has_told = not self.has_told, True
        return self.prompt_logprobs if is_first and self.prompt_logprobs else None

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens `[start, end)` of prompt and output together."""
        num_prompt = len(self.prompt)
        if end <= num_prompt:
            return self.prompt[start:end]
        return self.prompt[start:] + self.output[max(0, start - num_prompt) : end - num_prompt]
