"""The engine: messages in, messages out, one iteration per `step`. Knows nothing of processes, sockets or
HTTP.

    plan    = scheduler.plan(now)
    handle  = runner.submit(plan)
    events  = scheduler.commit(plan, handle.result())

With a pipeline depth of one the host plans and prepares iteration n + 1 while the device runs n; with depth
zero (CPUs, tests) the same code commits each iteration before it plans the next.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from weft_scheduler.outcomes import PackDone, SequenceToken, StepDone, StepResult
from weft_scheduler.plan import SegmentKind, StepPlan
from weft_scheduler.prefix import PrefixSpec, prefix_root
from weft_scheduler.requests import RequestSpec, RequestTooLarge, ServiceTier
from weft_scheduler.scheduler import Scheduler
from weft_server.adapters.fetch import AdapterFetcher, CheckResult
from weft_server.engine.jobs import JobManager
from weft_server.engine.paging import AdapterPager
from weft_server.engine.runner import Runner, RunResult, StepHandle
from weft_server.engine.sequence import Sequence
from weft_server.errors import Internal
from weft_server.protocol import (
    Abort,
    AdapterChecked,
    CancelJob,
    CheckAdapter,
    CheckFailed,
    ChoiceDelta,
    FromEngine,
    Generate,
    Heartbeat,
    RequestFailed,
    SetPinnedAdapters,
    SetTenantConcurrency,
    SetTenantWeights,
    Shutdown,
    StartJob,
    StepOutput,
    TenantQueue,
    ToEngine,
)

log = logging.getLogger(__name__)

_KEPT_ITERATIONS = 4096


@dataclass(slots=True)
class _InFlight:
    plan: StepPlan
    handle: StepHandle


class Engine:
    """One base model, one device, many tenants. Single-threaded: its owner calls everything from one
    thread."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: Runner,
        pager: AdapterPager,
        fetcher: AdapterFetcher,
        jobs: JobManager,
        pipeline_depth: int = 0,
        prefix_cache: bool = True,
        record_plan: Callable[[list[str]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._pager = pager
        self._fetcher = fetcher
        self._jobs = jobs
        self._depth = pipeline_depth
        self._prefix_cache = prefix_cache
        self._record_plan = record_plan
        self._clock = clock
        self._in_flight: deque[_InFlight] = deque()
        self._num_checking = 0
        self._outbox: list[FromEngine] = []
        self._iterations: deque[tuple[float, float]] = deque(maxlen=_KEPT_ITERATIONS)
        self._num_iterations = 0
        self.ran = False
        """Whether the last `step` computed anything; if not, there is no point in another before something
        arrives."""
        self._counters = dict.fromkeys(_COUNTERS, 0.0)

    # ------------------------------------------------------------ messages

    def handle(self, message: ToEngine) -> None:
        """Take one message of the API process; answers come out of `step`."""
        if isinstance(message, Generate):
            self._generate(message)
        elif isinstance(message, Abort):
            self._abort(message.request_id)
        elif isinstance(message, StartJob):
            self._jobs.start(message)
        elif isinstance(message, CancelJob):
            self._outbox += self._jobs.cancel(message.job_id)
        elif isinstance(message, CheckAdapter):
            self._num_checking += 1
            self._fetcher.submit_check(message.check_id, message.config_blob, message.weights_blob)
        elif isinstance(message, SetTenantWeights):
            for tenant, weight in message.weights.items():
                self._scheduler.set_weight(tenant, weight)
        elif isinstance(message, SetTenantConcurrency):
            self._scheduler.set_max_concurrency(message.max_concurrency)
        elif isinstance(message, SetPinnedAdapters):
            self._pager.pin_exactly(message.adapters)
        elif isinstance(message, Shutdown):
            raise TypeError("Shutdown belongs to the process around the engine")

    def _generate(self, message: Generate) -> None:
        sampling, num_sent = message.sampling, len(message.generated)
        adapter, now = message.adapter, self._clock()
        stranger = _first_outside(message, self._runner.vocab_size)
        if stranger is not None:
            self._outbox.append(RequestFailed(message.request_id, 400, "invalid_request", stranger))
            return
        tokens = message.prompt + message.generated
        spec = RequestSpec(
            sequence_id=message.request_id,
            tenant=message.tenant,
            num_prompt_tokens=len(tokens),
            max_new_tokens=sampling.max_tokens - num_sent,
            min_new_tokens=max(0, sampling.min_tokens - num_sent),
            stop_token_ids=frozenset(sampling.stop_token_ids),
            adapter=None if adapter is None else adapter.digest,
            prefix=self._prefix(message, tokens),
            priority=message.priority,
            tier=ServiceTier(message.tier),
            deadline_s=None if message.remaining_s is None else now + message.remaining_s,
        )
        try:
            self._scheduler.add_request(spec, now)
        except RequestTooLarge as error:
            self._outbox.append(RequestFailed(message.request_id, 400, "context_length_exceeded", str(error)))
            return
        except ValueError as error:
            self._outbox.append(RequestFailed(message.request_id, 400, "invalid_request", str(error)))
            return
        if adapter is not None:
            self._pager.know(adapter)
        self._runner.add_sequence(
            Sequence(
                request_id=message.request_id,
                prompt=list(message.prompt),
                params=sampling,
                choice_idx=message.choice_idx,
                adapter=spec.adapter,
                output=list(message.generated),
                has_told=num_sent > 0,
            )
        )
        self._counters["prompt_tokens"] += len(message.prompt)

    def _prefix(self, message: Generate, tokens: list[int]) -> PrefixSpec | None:
        """A request's place in the prefix cache. Log-probabilities of a prompt need all of it computed."""
        if not self._prefix_cache:
            return None
        root = prefix_root(message.tenant, None if message.adapter is None else message.adapter.digest)
        return PrefixSpec(root, tokens, is_read=message.sampling.prompt_logprobs is None)

    def _abort(self, request_id: str) -> None:
        self._scheduler.abort(request_id)
        self._forget(request_id)

    def _forget(self, request_id: str) -> Sequence | None:
        sequence = self._runner.remove_sequence(request_id)
        if sequence is not None and sequence.adapter is not None:
            self._pager.forget(sequence.adapter)
        return sequence

    # ------------------------------------------------------------ one iteration

    def step(self, has_arrivals: Callable[[], bool] = lambda: False) -> list[FromEngine]:
        """Run one iteration (or none, if there is nothing to do) and return what the API process must
        hear.

        Args:
            has_arrivals: whether messages wait to be handled; cheap, asked after every few backward slices.
                Without a pipeline, finetuning then stops where it is, to go on in a later iteration.
        """
        self._poll()
        plan = self._scheduler.plan(self._clock())
        for request_id in plan.expired:
            self._fail(request_id, 504, "deadline_exceeded", "the request's deadline has passed")
        self._pager.carry_out(plan.memory)
        self._jobs.take_places(plan.memory.adapter_loads)
        self.ran = not plan.is_empty or bool(self._in_flight)
        if plan.is_empty:
            if self._in_flight:
                self._commit(self._in_flight.popleft())
            return self._take_outbox()
        if self._runner.reads_uncollected_tokens(plan):
            # Collected, not committed: the plan at hand may go on with a sequence that ends at that commit.
            for item in self._in_flight:
                item.handle.result()
        if self._record_plan is not None:
            # A crash may come from the plan before: its errors surface while the next is under way.
            plans = [plan, *(item.plan for item in self._in_flight)]
            self._record_plan(list(dict.fromkeys(name for each in plans for name in _ids(each))))
        if self._depth:  # the next plan is made as if this one had run to its end
            handle = self._runner.submit(plan, self._jobs.active)
        else:
            handle = self._runner.submit(plan, self._jobs.active, has_arrivals)
        self._in_flight.append(_InFlight(plan, handle))
        while len(self._in_flight) > self._depth:
            self._commit(self._in_flight.popleft())
        return self._take_outbox()

    @property
    def has_work(self) -> bool:
        """True while requests or jobs are unfinished (they may wait for something on its way)."""
        return bool(self._in_flight) or self._scheduler.has_work()

    @property
    def awaits_background(self) -> bool:
        """True while a fetch, a check or a job's file work may finish any moment."""
        return self._num_checking > 0 or self._pager.is_busy or self._jobs.is_busy

    def shut_down(self) -> list[FromEngine]:
        """Commit what is in flight and checkpoint running jobs. The messages are to be sent before `close`,
        which may have to wait for a thread that waits for the store."""
        while self._in_flight:
            self._commit(self._in_flight.popleft())
        return self._take_outbox() + self._jobs.checkpoint_all()

    def close(self) -> None:
        """Stop all threads without saving anything; blocks until they have done what they had begun."""
        self._jobs.close()
        self._fetcher.close()

    def _commit(self, item: _InFlight) -> None:
        result, now = item.handle.result(), self._clock()
        for request_id, reason in result.failed.items():
            self._scheduler.fail(request_id)
            self._fail(request_id, 500, "non_finite_logits", reason)
        ran = StepResult(result.sampled, result.elapsed_s, result.num_slices, result.num_optimizer_steps)
        outcomes = self._scheduler.commit(item.plan, ran, now)
        self._count(item.plan, result)
        deltas: list[ChoiceDelta] = []
        for outcome in outcomes:
            if isinstance(outcome, SequenceToken):
                delta = self._token(outcome, result)
                if delta is not None:
                    deltas.append(delta)
            elif isinstance(outcome, PackDone):
                self._jobs.pack_done(outcome.pack_id)
            elif isinstance(outcome, StepDone) and outcome.job_id in result.steps:
                self._outbox += self._jobs.step_done(outcome.job_id, result.steps[outcome.job_id], now)
        if deltas:
            self._outbox.append(StepOutput(deltas))

    def _token(self, outcome: SequenceToken, result: RunResult) -> ChoiceDelta | None:
        sequence = self._runner.sequence(outcome.sequence_id)
        if sequence is None:
            return None
        self._counters["generation_tokens"] += 1
        logprob = result.logprobs.get(outcome.sequence_id)
        if outcome.finish_reason is not None:
            self._forget(outcome.sequence_id)
        is_first = not sequence.has_told
        return ChoiceDelta(
            request_id=outcome.sequence_id,
            token_ids=[outcome.token_id],
            logprobs=None if logprob is None else [logprob],
            finish_reason=outcome.finish_reason,
            prompt_logprobs=sequence.take_prompt_logprobs(),
            num_cached_tokens=outcome.num_cached_tokens if is_first else None,
        )

    def _fail(self, request_id: str, status: int, code: str, message: str) -> None:
        self._scheduler.abort(request_id)
        if self._forget(request_id) is not None:
            self._outbox.append(RequestFailed(request_id, status, code, message))

    # ------------------------------------------------------------ background work

    def _poll(self) -> None:
        for failure in self._pager.poll():
            for request_id in failure.request_ids:
                self._fail(request_id, failure.status, failure.code, failure.message)
        self._outbox += self._jobs.poll(self._clock())
        for check in self._fetcher.checked():
            self._num_checking -= 1
            self._outbox.append(_check_result(check))

    # ------------------------------------------------------------ metrics

    def heartbeat(self) -> Heartbeat:
        """Gauges, counters and the iterations since the last call. Safe to call from another thread."""
        iterations = [self._iterations.popleft() for _ in range(len(self._iterations))]
        scheduler = self._scheduler
        gauges = {
            "num_requests_running": float(scheduler.num_running),
            "num_requests_waiting": float(scheduler.num_waiting),
            "kv_cache_usage_perc": scheduler.kv_usage,
            "adapter_arena_usage_perc": scheduler.arena_usage,
            "num_adapters_on_device": float(scheduler.num_adapters_on_device),
            "num_adapters_pinned": float(scheduler.num_adapters_pinned),
            "num_finetune_jobs_running": float(self._jobs.num_running),
            "cost_model_error_p50": scheduler.cost.error_p50,
            "cost_model_error_p95": scheduler.cost.error_p95,
            "iteration_budget_seconds": scheduler.budget.decode_budget_s,
            "tpot_target_seconds": scheduler.budget.tpot_s,
        }
        counters = self._counters | {
            "finetune_steps": float(self._jobs.num_steps),
            **self._pager.counters(),
            "prefix_cache_queries": float(scheduler.num_prefix_queries),
            "prefix_cache_hits": float(scheduler.num_prefix_hits),
        }
        queues = {
            tenant: TenantQueue(queue.num_waiting, queue.drain_s)
            for tenant, queue in scheduler.queues(self._clock()).items()
        }
        return Heartbeat(self._num_iterations, gauges, counters, iterations, queues)

    def _count(self, plan: StepPlan, result: RunResult) -> None:
        self._num_iterations += 1
        is_whole = result.num_slices == len(plan.backward)
        self._iterations.append((result.elapsed_s, plan.predicted_s if is_whole else 0.0))
        trained = sum(s.num_tokens for s in plan.forward if s.kind is SegmentKind.TRAIN)
        self._counters["finetune_forward_tokens"] += trained
        self._counters["finetune_backward_slices"] += result.num_slices
        self._counters["iteration_tokens"] += plan.num_forward_tokens
        self._counters["num_preemptions"] += len(plan.memory.preempted)
        self._counters["finetune_packs_dropped"] += len(plan.memory.dropped_packs)

    def _take_outbox(self) -> list[FromEngine]:
        messages, self._outbox = self._outbox, []
        return messages


_COUNTERS = (
    "prompt_tokens",
    "generation_tokens",
    "finetune_forward_tokens",
    "finetune_backward_slices",
    "iteration_tokens",
    "num_preemptions",
    "finetune_packs_dropped",
)


def _first_outside(message: Generate, vocab_size: int) -> str | None:
    """What is wrong with the first token id that the model does not know; None if it knows them all."""
    sampling = message.sampling
    for name, token_ids in (
        ("the prompt", message.prompt),
        ("the generated tokens", message.generated),
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", sampling.logit_bias),
    ):
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            token_id = next(idx for idx in token_ids if not 0 <= idx < vocab_size)
            return (
                f"{name} has the token id {token_id}, but this model has a vocabulary of {vocab_size} tokens "
                f"(0 to {vocab_size - 1}); leave out the text or id that stands for it"
            )
    return None


def _ids(plan: StepPlan) -> list[str]:
    jobs = {
        segment.sequence_id.split("/")[0] for segment in plan.forward if segment.kind is SegmentKind.TRAIN
    }
    jobs.update(pack_id.split("/")[0] for item in plan.backward for pack_id in item.pack_ids)
    jobs.update(plan.optimizer_steps)
    return [s.sequence_id for s in plan.forward if s.kind is not SegmentKind.TRAIN] + sorted(jobs)


def _check_result(check: CheckResult) -> AdapterChecked | CheckFailed:
    summary = check.summary
    if summary is None:
        error = check.error or Internal("the check ended without a result")
        return CheckFailed(
            check.check_id, error.status, error.code or "invalid_adapter", error.message, error.param
        )
    return AdapterChecked(
        check_id=check.check_id,
        digest=summary.digest,
        max_rank=summary.max_rank,
        target_modules=list(summary.target_modules),
        num_parameters=summary.num_parameters,
        weights_bytes=summary.weights_bytes,
    )
