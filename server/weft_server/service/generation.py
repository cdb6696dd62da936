"""Use case: generate text. From a prompt or conversation to the engine's choices and back to text.

Owns seeds, default lengths and the accounting of a request; its prompts are encoded by `service/prompts.py`.
Knows no wire format: the API hands it values and formats what it yields.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from weft_server.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, WeftError
from weft_server.metrics import Metrics
from weft_server.protocol import ChoiceDelta, EngineReady, FinishReason, Generate
from weft_server.service.admission import Admission, QueueLimits, Ticket
from weft_server.service.choice import ChoiceOutput, ChoiceText, Echo, ScoredToken
from weft_server.service.choice_timer import ChoiceTimer
from weft_server.service.engine_port import EnginePort
from weft_server.service.merge import merge, unless_first
from weft_server.service.models import ModelService
from weft_server.service.prompts import PromptEncoder, PromptInput, check_context
from weft_server.service.request_class import DEFAULT_CLASS, RequestClass
from weft_server.service.sampling import GenerationDefaults, SamplingRequest, merge_sampling
from weft_server.service.tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
MAX_CHOICES = 2048


@dataclass(frozen=True, slots=True)
class PlannedChoice:
    """One choice as it will be sent. `hides_answer`: only the prompt is wanted (its echo, its logprobs)."""

    idx: int
    message: Generate
    stop: tuple[str, ...]
    echo: Echo | None
    hides_answer: bool
    needs_engine: bool


@dataclass(frozen=True, slots=True)
class Generation:
    """A validated request: its choices (index = prompt index · n + choice) and the tokens of its prompts."""

    id: str
    tenant: str
    model: str
    choices: list[PlannedChoice]
    prompt_tokens: list[int]
    request_class: RequestClass

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once however many choices it has."""
        return sum(self.prompt_tokens)

    def num_cached_tokens(self, by_choice: Mapping[int, int]) -> int:
        """Tokens of all prompts that nobody had to compute, from what each choice found cached.

        Choices of one prompt find what the first of them computed: that one counts.
        """
        num_choices = len(self.choices) // len(self.prompt_tokens)
        fewest: dict[int, int] = {}
        for idx, num_tokens in by_choice.items():
            prompt_idx = idx // num_choices
            fewest[prompt_idx] = min(num_tokens, fewest.get(prompt_idx, num_tokens))
        return sum(fewest.values())


@dataclass(frozen=True, slots=True)
class FinishedChoice:
    """A whole choice. `num_cached_tokens` of its prompt were cached."""

    idx: int
    text: str
    tokens: list[ScoredToken]
    num_tokens: int
    finish_reason: FinishReason
    num_cached_tokens: int = 0


class GenerationService:
    """Plans and runs generations."""

    def __init__(
        self,
        engine: EnginePort,
        tokenizer: Tokenizer,
        models: ModelService,
        defaults: GenerationDefaults,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
        limits: QueueLimits | None = None,
        weights: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """
        Args:
            defaults: sampling of what a request leaves open.
            clock: seconds, for deadlines and latency metrics.
            draw_seed: the seed of a prompt whose request has none.
            limits: how many choices may wait for their first token; beyond, requests are refused with 429.
            weights: the tenants' weights now.
        """
        self._engine = engine
        self._tokenizer = tokenizer
        self._prompts = PromptEncoder(tokenizer)
        self._models = models
        self._defaults = defaults
        self._metrics = metrics
        self._clock = clock
        self._draw_seed = draw_seed
        self._tickets: dict[str, Ticket] = {}
        self._admission = Admission(
            limits or QueueLimits(),
            weights=weights,
            drain_s=self._drain_s,
            on_refused=lambda tenant, reason, num: metrics.requests_shed(tenant, reason.value, num),
            on_change=metrics.queue_changed,
        )

    async def plan_completion(
        self,
        tenant: str,
        model: str,
        prompts: Sequence[PromptInput],
        sampling: SamplingRequest,
        *,
        num_choices: int = 1,
        echo: bool = False,
        request_class: RequestClass = DEFAULT_CLASS,
    ) -> Generation:
        """Validate a completion request and encode its prompts.

        Args:
            prompts: texts (encoded with the tokenizer's special tokens) or token ids (used as they are).
            num_choices: choices per prompt.
            echo: repeat the prompt in front of each choice; with it, `max_tokens` may be 0.
            request_class: tier, priority and deadline.

        Raises:
            NotFound: the model.
            InvalidRequest: an empty prompt, ids outside the vocabulary, too many choices.
            ContextLengthExceeded: a prompt plus its new tokens does not fit.
            Unavailable: the engine has not been ready yet, or the store is away.
        """
        info = self._engine_info()
        _check_num_choices(len(prompts), num_choices)
        resolved = await self._models.resolve(tenant, model)
        generation_id = f"cmpl-{secrets.token_hex(16)}"
        choices: list[PlannedChoice] = []
        prompt_tokens: list[int] = []
        asked = DEFAULT_COMPLETION_TOKENS if sampling.max_tokens is None else sampling.max_tokens
        if asked == 0 and not echo:
            raise InvalidRequest(
                "'max_tokens' is 0: nothing would be generated. Give at least 1, or `echo: true`.",
                param="max_tokens",
                code="invalid_value",
            )
        max_tokens = max(1, asked)
        all_encoded = await self._prompts.encode(
            tenant,
            prompts,
            num_new_tokens=asked,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            with_echo=echo,
        )
        for prompt_idx, encoded in enumerate(all_encoded):
            params = merge_sampling(
                sampling,
                self._defaults,
                self._tokenizer,
                max_tokens=max_tokens,
                vocab_size=info.vocab_size,
                seed=self._seed(sampling),
                prompt_logprobs=sampling.logprobs if echo else None,
            )
            message = Generate(
                "",
                tenant,
                encoded.ids,
                params,
                adapter=resolved.adapter,
                tier=request_class.tier,
                priority=request_class.priority,
            )
            prompt_tokens.append(len(encoded.ids))
            for choice_idx in range(num_choices):
                idx = prompt_idx * num_choices + choice_idx
                choices.append(
                    PlannedChoice(
                        idx=idx,
                        message=replace(message, request_id=f"{generation_id}-{idx}", choice_idx=choice_idx),
                        stop=sampling.stop,
                        echo=encoded if echo else None,
                        hides_answer=asked == 0,
                        needs_engine=asked > 0 or sampling.logprobs is not None,
                    )
                )
        return Generation(generation_id, tenant, model, choices, prompt_tokens, request_class)

    async def plan_chat(
        self,
        tenant: str,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        sampling: SamplingRequest,
        *,
        num_choices: int = 1,
        template_variables: Mapping[str, Any] | None = None,
        request_class: RequestClass = DEFAULT_CLASS,
    ) -> Generation:
        """Validate a chat request, render and encode its messages.

        Without `max_tokens` an answer may use the model's `max_new_tokens`, or else the rest of the context.

        Raises:
            As `plan_completion`; InvalidRequest also for a model without chat template, or one that refuses.
        """
        info = self._engine_info()
        _check_num_choices(1, num_choices)
        resolved = await self._models.resolve(tenant, model)
        ids = await self._prompts.encode_chat(
            tenant, messages, max_model_len=info.max_model_len, template_variables=template_variables
        )
        room = info.max_model_len - len(ids)
        if sampling.max_tokens is None:
            max_tokens = max(1, min(room, self._defaults.max_new_tokens or room))
        else:
            max_tokens = sampling.max_tokens
        check_context(len(ids), max_tokens, info.max_model_len, "messages")
        params = merge_sampling(
            sampling,
            self._defaults,
            self._tokenizer,
            max_tokens=max_tokens,
            vocab_size=info.vocab_size,
            seed=self._seed(sampling),
            prompt_logprobs=None,
        )
        generation_id = f"chatcmpl-{secrets.token_hex(16)}"
        message = Generate(
            generation_id,
            tenant,
            ids,
            params,
            adapter=resolved.adapter,
            tier=request_class.tier,
            priority=request_class.priority,
        )
        choices = [
            PlannedChoice(
                idx=idx,
                message=replace(message, request_id=f"{generation_id}-{idx}", choice_idx=idx),
                stop=sampling.stop,
                echo=None,
                hides_answer=False,
                needs_engine=True,
            )
            for idx in range(num_choices)
        ]
        return Generation(generation_id, tenant, model, choices, [len(ids)], request_class)

    async def stream(self, generation: Generation) -> AsyncGenerator[ChoiceOutput, None]:
        """Yield news of all choices as it comes; each choice's last output has a `finish_reason`.

        Closing the generator aborts what is unfinished. One failing choice fails the request.

        Raises:
            Overloaded: a queue is full, and this request is the one to go, on arrival or while it waits.
            InvalidRequest: it has more choices than may ever wait.
            DeadlineExceeded: the request's own timeout has passed.
            WeftError: what the engine reports.
        """
        refused: asyncio.Future[Overloaded] = asyncio.get_running_loop().create_future()
        with self._queued(generation, refused) as ticket:
            for num_tokens in generation.prompt_tokens:
                self._metrics.prompt_accepted(generation.tenant, num_tokens)
            cached: dict[int, int] = {}
            runs = [self._run(choice, generation.request_class, ticket) for choice in generation.choices]
            async with aclosing(unless_first(merge(runs), refused)) as outputs:
                try:
                    async for output in outputs:
                        self._admission.begin(ticket, output.idx)
                        if output.num_cached_tokens is not None:
                            cached[output.idx] = output.num_cached_tokens
                        yield output
                except WeftError as error:
                    if error.code == "adapter_too_large":
                        error.message = f"Model '{generation.model}': {error.message}"
                    raise
                finally:
                    self._metrics.prompt_cached(generation.tenant, generation.num_cached_tokens(cached))

    def response_began(self, generation: Generation) -> None:
        """The client has been told that its answer comes: the request is not refused any more."""
        ticket = self._tickets.get(generation.id)
        if ticket is not None:
            self._admission.begin(ticket)

    async def collect(self, generation: Generation) -> list[FinishedChoice]:
        """Run to the end; the choices in order of their index. Raises as `stream`; cancelling it aborts."""
        texts: dict[int, list[str]] = {choice.idx: [] for choice in generation.choices}
        tokens: dict[int, list[ScoredToken]] = {choice.idx: [] for choice in generation.choices}
        num_tokens: Counter[int] = Counter()
        cached: Counter[int] = Counter()
        reasons: dict[int, FinishReason] = {}
        async with aclosing(self.stream(generation)) as outputs:
            async for output in outputs:
                texts[output.idx].append(output.text)
                tokens[output.idx].extend(output.tokens)
                num_tokens[output.idx] += output.num_tokens
                cached[output.idx] += output.num_cached_tokens or 0
                if output.finish_reason is not None:
                    reasons[output.idx] = output.finish_reason
        return [
            FinishedChoice(idx, "".join(texts[idx]), tokens[idx], num_tokens[idx], reasons[idx], cached[idx])
            for idx in sorted(texts)
        ]

    async def _run(
        self, choice: PlannedChoice, request_class: RequestClass, ticket: Ticket
    ) -> AsyncGenerator[ChoiceOutput, None]:
        """One choice, from the engine's deltas to text, with its metrics."""
        tenant, sampling = choice.message.tenant, choice.message.sampling
        text = ChoiceText(
            self._tokenizer,
            choice.message.prompt,
            idx=choice.idx,
            stop=choice.stop,
            min_tokens=sampling.min_tokens,
            wants_logprobs=sampling.logprobs is not None,
            echo=choice.echo,
        )
        if not choice.needs_engine:
            yield text.add(ChoiceDelta(choice.message.request_id, [], finish_reason="length"))
            return
        timer = ChoiceTimer(self._metrics, tenant, self._clock)
        num_tokens = 0
        try:
            message = replace(choice.message, remaining_s=request_class.remaining_s(self._clock()))
            async with aclosing(self._engine.generate(message)) as deltas:
                async for delta in deltas:
                    if choice.hides_answer:
                        delta = replace(delta, token_ids=[], logprobs=None, finish_reason="length")
                    output = text.add(delta)
                    timer.tokens(output.num_tokens)
                    num_tokens += output.num_tokens
                    if output.finish_reason is not None:
                        timer.finished(output.finish_reason)
                    yield output
                    if output.finish_reason is not None:
                        return
            raise Unavailable("The engine ended this generation without finishing it.", retry_after_s=1.0)
        except DeadlineExceeded as error:
            timer.failed(error.code or error.type)
            raise request_class.too_late(num_tokens) from None
        except WeftError as error:
            timer.failed(error.code or error.type)
            raise
        finally:
            if ticket.is_refused:
                timer.refused()
            timer.aborted_unless_ended()

    def _seed(self, sampling: SamplingRequest) -> int:
        """The request's seed, or one for each prompt, so that equal prompts of a request may differ."""
        return self._draw_seed() if sampling.seed is None else sampling.seed % 2**63

    def _engine_info(self) -> EngineReady:
        if self._engine.info is None:
            raise Unavailable(
                "The engine is still loading the model.", code="engine_not_ready", retry_after_s=2.0
            )
        return self._engine.info

    @contextmanager
    def _queued(self, generation: Generation, refused: asyncio.Future[Overloaded]) -> Iterator[Ticket]:
        """The generation's place in its tenant's queue, from now until it ends."""
        choices = {choice.idx for choice in generation.choices if choice.needs_engine}
        tenant, tier = generation.tenant, generation.request_class.tier
        ticket = self._admission.enter(tenant, tier, choices, refused.set_result)
        self._tickets[generation.id] = ticket
        try:
            yield ticket
        finally:
            del self._tickets[generation.id]
            self._admission.leave(ticket)

    def _drain_s(self, tenant: str, num_waiting: int) -> float | None:
        """Predicted seconds until so many waiting choices of a tenant have begun: the engine's latest word,
        and what has been sent since in proportion.
        """
        heartbeat = self._engine.heartbeat
        queue = None if heartbeat is None else heartbeat.queues.get(tenant)
        if queue is None or not queue.num_waiting:
            return None
        return queue.drain_s * num_waiting / queue.num_waiting


def _check_num_choices(num_prompts: int, num_choices: int) -> None:
    if num_prompts == 0:
        raise InvalidRequest("'prompt' is an empty list.", param="prompt", code="empty_prompt")
    if num_prompts * num_choices > MAX_CHOICES:
        raise InvalidRequest(
            f"{num_prompts} prompts with {num_choices} choices each are more than {MAX_CHOICES} choices; "
            "send several requests.",
            param="n" if num_prompts == 1 else "prompt",
            code="too_many_choices",
        )
