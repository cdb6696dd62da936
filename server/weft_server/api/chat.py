"""POST /v1/chat/completions: OpenAI's wire format around the generation service."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from weft_server.api.dependencies import AppServices, CallerTenant, openai_body
from weft_server.api.openapi import json_body
from weft_server.api.schemas_generation import CHAT_NEUTRAL, ChatRequest
from weft_server.api.streaming import event, event_stream, json_response, unless_disconnected
from weft_server.api.usage import system_fingerprint, usage
from weft_server.errors import InvalidRequest
from weft_server.protocol import FinishReason
from weft_server.service.choice import Candidate, ScoredToken
from weft_server.service.generation import Generation, GenerationService

router = APIRouter(tags=["openai"])


@router.post("/v1/chat/completions", openapi_extra=json_body(ChatRequest))
async def create_chat_completion(
    request: Request,
    services: AppServices,
    tenant: CallerTenant,
    body: Annotated[ChatRequest, Depends(openai_body(ChatRequest, CHAT_NEUTRAL))],
) -> Response:
    """Answer a conversation; whole, or streamed as server-sent events."""
    num_choices = body.n or 1
    generation = await services.generation.plan_chat(
        tenant.name,
        body.model,
        [message.for_template() for message in body.messages],
        body.sampling(max_tokens=_max_tokens(body), logprobs=_num_logprobs(body)),
        num_choices=num_choices,
        template_variables=body.chat_template_kwargs,
        request_class=body.request_class(request.state.arrived_s),
    )
    head = {
        "id": generation.id,
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": system_fingerprint(services.engine.info),
        "service_tier": generation.request_class.tier,
    }
    if body.stream:
        return await event_stream(
            request,
            _events(services.generation, generation, head, body),
            on_begin=lambda: services.generation.response_began(generation),
        )
    choices = await unless_disconnected(request, services.generation.collect(generation))
    num_tokens = sum(choice.num_tokens for choice in choices)
    num_cached = generation.num_cached_tokens({choice.idx: choice.num_cached_tokens for choice in choices})
    return json_response(
        {
            **head,
            "choices": [
                {
                    "index": choice.idx,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": _logprobs(choice.tokens) if body.logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for choice in choices
            ],
            "usage": usage(generation.num_prompt_tokens, num_tokens, num_cached),
        }
    )


async def _events(
    service: GenerationService, generation: Generation, head: dict[str, Any], body: ChatRequest
) -> AsyncGenerator[bytes, None]:
    if body.include_usage:
        head = {**head, "usage": None}
    started: set[int] = set()
    num_tokens = 0
    cached: dict[int, int] = {}
    async with aclosing(service.stream(generation)) as outputs:
        async for output in outputs:
            num_tokens += output.num_tokens
            if output.num_cached_tokens is not None:
                cached[output.idx] = output.num_cached_tokens
            if output.idx not in started:
                started.add(output.idx)
                yield event({**head, "choices": [_chunk(output.idx, {"role": "assistant", "content": ""})]})
            if output.text or output.tokens:
                logprobs = _logprobs(output.tokens) if body.logprobs else None
                delta = {"content": output.text}
                yield event({**head, "choices": [_chunk(output.idx, delta, logprobs=logprobs)]})
            if output.finish_reason is not None:
                yield event({**head, "choices": [_chunk(output.idx, {}, output.finish_reason)]})
    if body.include_usage:
        num_cached = generation.num_cached_tokens(cached)
        counts = usage(generation.num_prompt_tokens, num_tokens, num_cached)
        yield event({**head, "choices": [], "usage": counts})


def _chunk(
    idx: int,
    delta: dict[str, Any],
    finish_reason: FinishReason | None = None,
    *,
    logprobs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {"index": idx, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _max_tokens(body: ChatRequest) -> int | None:
    """`max_completion_tokens`, or the older `max_tokens`; a contradiction is refused."""
    if (
        None not in (body.max_tokens, body.max_completion_tokens)
        and body.max_tokens != body.max_completion_tokens
    ):
        raise InvalidRequest(
            f"'max_tokens' ({body.max_tokens}) and 'max_completion_tokens' ({body.max_completion_tokens}) "
            "contradict each other; give one of them.",
            param="max_tokens",
            code="invalid_value",
        )
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    value = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if value == 0:
        raise InvalidRequest(f"'{name}' is 0; give at least 1.", param=name, code="invalid_value")
    return value


def _num_logprobs(body: ChatRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequest(
            f"'top_logprobs' = {body.top_logprobs} needs 'logprobs': true.",
            param="top_logprobs",
            code="invalid_value",
        )
    return None


def _logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    content = [
        {
            "token": token.text,
            "logprob": token.logprob,
            "bytes": list(token.raw),
            "top_logprobs": [_alternative(candidate) for candidate in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _alternative(candidate: Candidate) -> dict[str, Any]:
    return {"token": candidate.text, "logprob": candidate.logprob, "bytes": list(candidate.raw)}
