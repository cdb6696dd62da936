"""How a request wants its tokens drawn, the model's defaults for what it leaves open, and the merge of both.

Pure values. The wire format is the API's, the drawing the engine's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft_server.errors import ConfigError, InvalidRequest
from weft_server.protocol import SamplingParams
from weft_server.service.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "guidance_scale": (1.0,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ({}, []),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": ([],),
    "exponential_decay_length_penalty": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "stop_strings": ([],),
    "max_time": (),
    "watermarking_config": (),
    "token_healing": (False,),
    "remove_invalid_values": (False,),
}
"""Keys of `generation_config.json` that change what transformers generates, and at which values they do not
(null never does).
"""


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """Sampling as asked for; None means the model's default. Ranges are checked by whoever builds it.

    `logprobs` is the number of alternatives wanted beside each sampled token, None for no logprobs at all.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling defaults.

    The values here are OpenAI's. `max_new_tokens` bounds chat when the request does not.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None


def read_generation_defaults(path: Path, *, required: bool = False) -> GenerationDefaults:
    """Read `generation_config.json`. Warns of keys that would change the output and are not implemented.

    Args:
        path: the file, or the directory that has it.
        required: whether its absence is an error.

    Raises:
        ConfigError: unreadable, or a value out of range.
    """
    file = path / "generation_config.json" if path.is_dir() else path
    if not file.is_file():
        if required:
            raise ConfigError(f"--generation-config {path}: there is no generation_config.json.")
        return GenerationDefaults()
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: must be a JSON object.")
    _warn_of_ignored(file, config)
    top_k = _number(file, config, "top_k", 0, 0, 2**31)
    max_new_tokens = _number(file, config, "max_new_tokens", 0, 1, 2**31)
    # An explicit `do_sample: false` is the model author's wish for greedy decoding.
    greedy = config.get("do_sample") is False
    return GenerationDefaults(
        temperature=0.0 if greedy else _number(file, config, "temperature", 1.0, 0.0, 100.0),
        top_p=_number(file, config, "top_p", 1.0, 1e-9, 1.0),
        top_k=int(top_k) or None,
        min_p=_number(file, config, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=_number(file, config, "repetition_penalty", 1.0, 1e-9, 100.0),
        max_new_tokens=int(max_new_tokens) or None,
    )


def _warn_of_ignored(file: Path, config: Mapping[str, Any]) -> None:
    ignored = [
        f"{key} = {json.dumps(config[key])}"
        for key, neutral in _NOT_IMPLEMENTED.items()
        if config.get(key) is not None and config[key] not in neutral
    ]
    if ignored:
        log.warning(
            "%s: %s would change the output and is not implemented; requests are answered without",
            file,
            ", ".join(ignored),
        )


def merge_sampling(
    request: SamplingRequest,
    defaults: GenerationDefaults,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    vocab_size: int,
    seed: int,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """What the engine is told about one prompt's choices.

    Args:
        max_tokens: resolved; `request.max_tokens` is not looked at.
        vocab_size: the model's number of ids.
        seed: the request's or a drawn one.
        prompt_logprobs: as in `SamplingParams`.

    Raises:
        InvalidRequest: a token id outside the vocabulary, or contradictory limits.
    """
    _check_ids("logit_bias", list(request.logit_bias), vocab_size)
    _check_ids("stop_token_ids", request.stop_token_ids, vocab_size)
    if request.min_tokens > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' ({request.min_tokens}) is greater than the maximum of new tokens ({max_tokens}).",
            param="min_tokens",
            code="invalid_value",
        )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_given(request.temperature, defaults.temperature),
        top_p=_given(request.top_p, defaults.top_p),
        top_k=defaults.top_k if request.top_k is None else (request.top_k if request.top_k > 0 else None),
        min_p=_given(request.min_p, defaults.min_p),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
        logit_bias=dict(request.logit_bias),
        seed=seed,
        min_tokens=request.min_tokens,
        stop_token_ids=_stop_ids(request, tokenizer, vocab_size),
        logprobs=request.logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _stop_ids(request: SamplingRequest, tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """End-of-sequence ids, the request's, and those of stop strings that are special tokens (which show no
    text); without those of the tokenizer that the model cannot produce.
    """
    eos = () if request.ignore_eos else tokenizer.stop_ids
    special = [tokenizer.token_to_id(stop) for stop in request.stop]
    ids = (*eos, *request.stop_token_ids, *(idx for idx in special if idx in tokenizer.special_ids))
    return tuple(dict.fromkeys(idx for idx in ids if idx is not None and idx < vocab_size))


def _check_ids(param: str, token_ids: Sequence[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"'{param}' has the token id {token_id}; this model's ids are 0 to {vocab_size - 1}.",
                param=param,
                code="invalid_value",
            )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _number(
    file: Path, config: dict[str, Any], key: str, default: float, minimum: float, maximum: float
) -> float:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value <= maximum:
        raise ConfigError(f"{file}: {key} is {value!r}; allowed: {minimum} to {maximum}.")
    return float(value)
