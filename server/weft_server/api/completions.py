"""POST /v1/completions: OpenAI's wire format around the generation service."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from weft_server.api.dependencies import AppServices, CallerTenant, openai_body
from weft_server.api.openapi import json_body
from weft_server.api.schemas_generation import COMPLETION_NEUTRAL, CompletionRequest
from weft_server.api.streaming import event, event_stream, json_response, unless_disconnected
from weft_server.api.usage import system_fingerprint, usage
from weft_server.errors import InvalidRequest
from weft_server.service.choice import ScoredToken
from weft_server.service.generation import Generation, GenerationService

router = APIRouter(tags=["openai"])


@router.post("/v1/completions", openapi_extra=json_body(CompletionRequest))
async def create_completion(
    request: Request,
    services: AppServices,
    tenant: CallerTenant,
    body: Annotated[CompletionRequest, Depends(openai_body(CompletionRequest, COMPLETION_NEUTRAL))],
) -> Response:
    """Complete one or more prompts, given as text or token ids; whole, or streamed as server-sent events."""
    num_choices = _num_choices(body)
    generation = await services.generation.plan_completion(
        tenant.name,
        body.model,
        body.prompts(),
        body.sampling(max_tokens=body.max_tokens, logprobs=body.logprobs),
        num_choices=num_choices,
        echo=bool(body.echo),
        request_class=body.request_class(request.state.arrived_s),
    )
    head = {
        "id": generation.id,
        "object": "text_completion",
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
                _choice(choice.idx, choice.text, choice.tokens, choice.finish_reason, body)
                for choice in choices
            ],
            "usage": usage(generation.num_prompt_tokens, num_tokens, num_cached),
        }
    )


async def _events(
    service: GenerationService, generation: Generation, head: dict[str, Any], body: CompletionRequest
) -> AsyncGenerator[bytes, None]:
    if body.include_usage:
        head = {**head, "usage": None}
    num_tokens = 0
    cached: dict[int, int] = {}
    async with aclosing(service.stream(generation)) as outputs:
        async for output in outputs:
            num_tokens += output.num_tokens
            if output.num_cached_tokens is not None:
                cached[output.idx] = output.num_cached_tokens
            if output.text or output.tokens or output.finish_reason is not None:
                choice = _choice(output.idx, output.text, output.tokens, output.finish_reason, body)
                yield event({**head, "choices": [choice]})
    if body.include_usage:
        num_cached = generation.num_cached_tokens(cached)
        counts = usage(generation.num_prompt_tokens, num_tokens, num_cached)
        yield event({**head, "choices": [], "usage": counts})


def _num_choices(body: CompletionRequest) -> int:
    num_choices = body.n or 1
    if body.best_of is not None and body.best_of != num_choices:
        raise InvalidRequest(
            f"'best_of' = {body.best_of} is not supported. Leave it out, or set it to n = {num_choices}.",
            param="best_of",
            code="unsupported_parameter",
        )
    return num_choices


def _choice(
    idx: int, text: str, tokens: Sequence[ScoredToken], finish_reason: str | None, body: CompletionRequest
) -> dict[str, Any]:
    return {
        "index": idx,
        "text": text,
        "logprobs": None if body.logprobs is None else _logprobs(tokens),
        "finish_reason": finish_reason,
    }


def _logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """The legacy shape: parallel lists; the drawn token is always among its alternatives."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_alternatives(token) for token in tokens],
        "text_offset": [token.text_offset for token in tokens],
    }


def _alternatives(token: ScoredToken) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for candidate in token.top:
        found.setdefault(candidate.text, candidate.logprob)
    found.setdefault(token.text, token.logprob)
    return found
