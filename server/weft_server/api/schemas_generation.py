"""Wire models of completions and chat: the implemented fields, their ranges, and what else may be sent.

A field is either implemented here, or known and neutral at some values (`COMPLETION_NEUTRAL`,
`CHAT_NEUTRAL`), or unknown. Knows nothing of how generation works.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from weft_server.protocol import Tier
from weft_server.service.request_class import RequestClass
from weft_server.service.sampling import SamplingRequest

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_TIMEOUT_S = 86_400

_Count = Annotated[int, Field(ge=0, le=2**31 - 1)]


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


class SamplingFields(BaseModel):
    """What completions and chat have in common. An explicit `null` is the default everywhere."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: _Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    min_tokens: _Count | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    service_tier: str | None = None

    @field_validator("service_tier")
    @classmethod
    def _check_service_tier(cls, value: str | None) -> str | None:
        if value in ("priority", "scale"):
            raise PydanticCustomError(
                "unsupported_parameter", "Weft has the tiers 'default' (also 'auto') and 'flex'"
            )
        if value not in (None, "auto", "default", "flex"):
            raise ValueError("Must be 'auto', 'default' or 'flex'")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, value: Any) -> Any:
        strings = [value] if isinstance(value, str) else value
        if strings is None:
            return None
        if not isinstance(strings, list) or not all(isinstance(entry, str) for entry in strings):
            raise ValueError("Must be a string or a list of strings")
        if len(strings) > MAX_STOP_STRINGS:
            raise ValueError(f"At most {MAX_STOP_STRINGS} stop strings are allowed")
        if "" in strings:
            raise ValueError("A stop string must not be empty")
        return strings

    @field_validator("logit_bias")
    @classmethod
    def _check_logit_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError(f"Its keys are token ids, and {key!r} is none")
        return value

    @field_validator("stream_options")
    @classmethod
    def _check_stream_options(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("It needs 'stream': true")
        return value

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def request_class(self, arrived_s: float) -> RequestClass:
        """The service's value of `service_tier`, `priority` and `timeout`, for a request of that time."""
        tier: Tier = "flex" if self.service_tier == "flex" else "default"
        return RequestClass(tier, self.priority or 0, self.timeout, arrived_s)

    def sampling(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingRequest:
        """The service's value of these fields."""
        return SamplingRequest(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty,
            logit_bias={int(key): bias for key, bias in (self.logit_bias or {}).items()},
            seed=self.seed,
            min_tokens=self.min_tokens or 0,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
        )


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: Any
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @field_validator(
        "prompt", mode="before", json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    )
    @classmethod
    def _check_prompt(cls, value: Any) -> Any:
        if isinstance(value, str) or _is_id_list(value):
            return [value]
        if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
            return value
        if isinstance(value, list) and value and all(_is_id_list(entry) for entry in value):
            return value
        raise ValueError(
            "Must be a string, a list of strings, a list of token ids, or a list of such lists, not empty"
        )

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        return list(self.prompt)


def _only_empty(value: Any) -> None:
    if value not in (None, [], {}, ""):
        raise PydanticCustomError(
            "unsupported_parameter",
            "It would change the result, and Weft does not implement it; leave it out",
        )


_Unused = Annotated[None, BeforeValidator(_only_empty)]


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message. What an earlier answer's message carries besides its content is accepted when empty."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    tool_calls: _Unused = None
    tool_call_id: _Unused = None
    function_call: _Unused = None
    refusal: _Unused = None
    audio: _Unused = None
    annotations: _Unused = None
    reasoning_content: _Unused = None
    content: str
    name: str | None = None

    @field_validator("role", mode="before")
    @classmethod
    def _refuse_tools(cls, value: Any) -> Any:
        if value in ("tool", "function"):
            raise PydanticCustomError(
                "unsupported_parameter",
                "Weft does not implement tools; the roles are system, developer, user and assistant",
            )
        return value

    @field_validator("content", mode="before", json_schema_input_type=str | list[TextPart])
    @classmethod
    def _join_text_parts(cls, value: Any) -> Any:
        """Content given in parts is their text, on lines of their own, as vLLM joins them."""
        return "\n".join(_part_text(part) for part in value) if isinstance(value, list) else value

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees: `system` stands for OpenAI's newer name `developer`."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.name is not None:
            message["name"] = self.name
        return message


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError(
            "unsupported_parameter",
            f"Parts of type {kind!r} are not supported; only 'text' is".replace("{", "{{"),
        )
    if kind is None or set(part) != {"type", "text"} or not isinstance(part["text"], str):
        raise ValueError("A part must be {'type': 'text', 'text': a string}")
    return str(part["text"])


def _is_id_list(value: Any) -> bool:
    # Millions of ids may come in a body, and this runs on the event loop.
    return isinstance(value, list) and set(map(type, value)) == {int}


def _any(_value: Any) -> bool:
    return True


def _is(*values: Any) -> Any:
    """Whether a field's value is one of these (`True` is not 1)."""

    def test(value: Any) -> bool:
        return any(type(value) is type(neutral) and value == neutral for neutral in values)

    return test


def _is_empty(value: Any) -> bool:
    return isinstance(value, list | dict | str) and not value


_NEVER = _is()

_COMMON_NEUTRAL = {
    "user": _any,
    "metadata": _any,
    "safety_identifier": _any,
    "prompt_cache_key": _any,
    "prompt_cache_retention": _any,
    "prompt_cache_options": _any,
    "store": _is(False),
    "moderation": _NEVER,
    "include_stop_str_in_output": _is(False),
    "skip_special_tokens": _is(True),
    "spaces_between_special_tokens": _is(True),
    "prompt_logprobs": _NEVER,
    "allowed_token_ids": _NEVER,
    "bad_words": _is_empty,
    "logits_processors": _is_empty,
    "structured_outputs": _NEVER,
    "guided_json": _NEVER,
    "guided_regex": _NEVER,
    "guided_choice": _NEVER,
    "guided_grammar": _NEVER,
    "cache_salt": _NEVER,
    "return_token_ids": _is(False),
    "return_tokens_as_token_ids": _is(False),
    "truncate_prompt_tokens": _NEVER,
    "length_penalty": _is(1, 1.0),
    "early_stopping": _is(False),
    "use_beam_search": _is(False),
    "response_format": _is({"type": "text"}),
}

COMPLETION_NEUTRAL = {
    **_COMMON_NEUTRAL,
    "suffix": _is_empty,
    "add_special_tokens": _is(True),
}

CHAT_NEUTRAL = {
    **_COMMON_NEUTRAL,
    "tools": _is_empty,
    "tool_choice": _is("none", "auto"),
    "parallel_tool_calls": _any,
    "functions": _is_empty,
    "function_call": _is("none", "auto"),
    "modalities": _is(["text"]),
    "audio": _NEVER,
    "prediction": _NEVER,
    "reasoning_effort": _is("none"),
    "verbosity": _is("medium"),
    "web_search_options": _NEVER,
    "add_special_tokens": _is(False),
    "add_generation_prompt": _is(True),
    "continue_final_message": _is(False),
    "echo": _is(False),
    "best_of": _is(1),
    "chat_template": _NEVER,
    "documents": _is_empty,
    "mm_processor_kwargs": _is_empty,
    "include_reasoning": _any,
}
