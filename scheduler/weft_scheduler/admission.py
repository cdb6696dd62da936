"""Which requests can be queued at all: what their numbers must be, and what can never run.

Values in, a sequence out; who runs when is decided elsewhere.
"""

from __future__ import annotations

from weft_scheduler.limits import Limits
from weft_scheduler.prefix import PrefixChain
from weft_scheduler.requests import RequestSpec, RequestTooLarge, Sequence


def new_sequence(spec: RequestSpec, limits: Limits, order: int, now_s: float) -> Sequence:
    """The sequence of a request, the `order`-th to arrive.

    Raises:
        RequestTooLarge: it can never run: too long, or more KV than there is.
        ValueError: a number is out of range.
    """
    name = f"request {spec.sequence_id}"
    if spec.num_prompt_tokens < 1 or spec.max_new_tokens < 1 or spec.min_new_tokens < 0:
        raise ValueError(f"{name}: prompt and max_new_tokens must be at least 1, min_new_tokens at least 0")
    room = limits.max_model_len - spec.num_prompt_tokens
    if room < 0:
        raise RequestTooLarge(
            f"the prompt has {spec.num_prompt_tokens} tokens; the context holds {limits.max_model_len}"
        )
    # The last token sampled is never computed, so a prompt that fills the context can still be scored.
    max_new_tokens = min(spec.max_new_tokens, max(1, room))
    num_cached = spec.num_prompt_tokens + max_new_tokens - 1
    if num_cached > limits.capacity_tokens:
        raise RequestTooLarge(
            f"{spec.num_prompt_tokens} prompt tokens and up to {max_new_tokens} new ones need "
            f"{num_cached} tokens of cache; there are {limits.capacity_tokens}: ask for fewer new tokens"
        )
    if spec.prefix is not None and len(spec.prefix.token_ids) != spec.num_prompt_tokens:
        raise ValueError(
            f"{name}: prefix has {len(spec.prefix.token_ids)} token ids; "
            f"give those of all {spec.num_prompt_tokens} prompt tokens"
        )
    sequence = Sequence(spec, order, max_new_tokens, now_s, now_s)
    if spec.prefix is not None:
        sequence.chain = PrefixChain(spec.prefix.root, limits.block_size, spec.prefix.token_ids)
    return sequence
