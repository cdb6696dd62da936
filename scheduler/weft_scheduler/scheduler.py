"""The scheduler: turns requests, packs, clocks and sizes into plans, and results into outcomes.

`plan` brings adapters nearer, then asks the policy (`policies.WeftPolicy`): decode everything that runs,
continue and admit prompts, and give finetuning what the latency budget leaves. Owns no tensors, threads or
clocks; `now` is any monotonic time in seconds.

What may exceed the budget (everything else keeps `predicted_s` ≤ `budget_s`):
- decodes are never held back, and prompts get `MIN_PREFILL_TOKENS` tokens in every plan;
- finetuning gets one unit (window, slice or optimizer step) after `trickle_interval` plans without any, and
  in a plan that would otherwise be empty;
- a wave finishes its layer when decodes need the blocks of its packs.

Every decision advances the state at once. With several plans in flight, a plan is made as if no sequence
ended before it: a token beyond the end is discarded at commit, and what is freed is reused only after the
last plan that could read it has been committed. With one plan at a time, its backward may end early: what did
not run is taken back at commit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from weft_scheduler.adapter_policy import bring_adapters_nearer
from weft_scheduler.admission import new_sequence
from weft_scheduler.budget import BudgetController, LatencyTargets
from weft_scheduler.class_budgets import ClassBudgets
from weft_scheduler.commit import commit_tokens, commit_training
from weft_scheduler.cost import CostModel
from weft_scheduler.draft import PlanDraft
from weft_scheduler.drain import TenantQueue
from weft_scheduler.in_flight import InFlight
from weft_scheduler.ledger import Ledger
from weft_scheduler.limits import Limits
from weft_scheduler.outcomes import Outcome, StepResult
from weft_scheduler.plan import MemoryPlan, StepPlan
from weft_scheduler.policies import Policy, WeftPolicy
from weft_scheduler.requests import RequestSpec, RequestTooLarge
from weft_scheduler.state import SchedulerState
from weft_scheduler.training import PackSpec
from weft_scheduler.training_policy import withdraw

_JOB_PREFIX = "job:"


class Scheduler:
    """Plans iterations. Not thread-safe: one loop calls everything."""

    def __init__(
        self,
        limits: Limits,
        cost: CostModel,
        targets: LatencyTargets,
        tenant_weights: Mapping[str, float] | None = None,
        policy: Policy | None = None,
        flex_targets: LatencyTargets | None = None,
    ) -> None:
        """Start empty; `cost` is refitted by commits. Tenants that `tenant_weights` does not name have weight
        1. Without a `policy` (this scheduler's alone) it is Weft's. `flex_targets` hold while there are flex
        requests alone; by default they are `FLEX_FACTOR` times as long.

        Raises:
            ValueError: a weight is not positive and finite.
        """
        self.limits = limits
        self.cost = cost
        self._budgets = ClassBudgets(targets, flex_targets, limits.max_inflight)
        self._state = SchedulerState(limits, cost)
        self._ledger = Ledger(self._state.shares)
        self._policy = WeftPolicy() if policy is None else policy
        self._in_flight: deque[InFlight] = deque()
        self._iteration = 0
        self._num_arrivals = 0
        self.num_preemptions = 0
        self.num_packs_dropped = 0
        self._unreported = MemoryPlan()
        for tenant, weight in (tenant_weights or {}).items():
            self.set_weight(tenant, weight)

    # ------------------------------------------------------------ requests

    def add_request(self, spec: RequestSpec, now: float) -> None:
        """Queue a request.

        Raises: RequestTooLarge: it can never run: too long, more KV than there is, an adapter larger than its
            room.
            ValueError: its id is in use, or a number is out of range.
        """
        if spec.sequence_id in self._state.sequences:
            raise ValueError(f"request {spec.sequence_id} exists already")
        sequence = new_sequence(spec, self.limits, self._num_arrivals + 1, now)
        self._num_arrivals += 1
        self._state.meter_arrival(spec.tenant, now)
        self._state.enqueue(sequence)
        self._state.deadlines.add(sequence)

    def abort(self, sequence_id: str) -> bool:
        """Forget a request; returns False if it is not known (it may just have finished)."""
        sequence = self._state.sequences.get(sequence_id)
        if sequence is None:
            return False
        self._state.retire(sequence)
        return True

    def fail(self, sequence_id: str) -> bool:
        """Forget a request whose keys and values may be wrong (NaN): as `abort`, and the prefix cache forgets
        what it holds of its tokens. Call it before the plan that brought this to light is committed.
        """
        sequence = self._state.sequences.get(sequence_id)
        if sequence is not None:
            self._state.distrust(sequence)
        return self.abort(sequence_id)

    def set_weight(self, tenant: str, weight: float) -> None:
        """Give a tenant `weight` times the share of a tenant of weight 1.

        Raises:
            ValueError: the weight is not positive.
        """
        self._state.shares.set_weight(tenant, weight)

    def set_targets(self, targets: LatencyTargets, flex_targets: LatencyTargets | None = None) -> None:
        """Yield to these targets from the next plan on; what was learnt under others is forgotten.

        `flex_targets` are those of the flex class, by default `FLEX_FACTOR` times as long.
        """
        self._budgets = ClassBudgets(targets, flex_targets, self.limits.max_inflight)

    def set_max_concurrency(self, most: Mapping[str, int]) -> None:
        """Let at most so many requests of a tenant run at a time; tenants not named have no such limit.

        What runs already goes on.

        Raises:
            ValueError: a limit is below 1; nothing has changed.
        """
        for tenant, limit in most.items():
            if limit < 1:
                raise ValueError(f"max_concurrency of {tenant} is {limit}; it must be at least 1")
        self._state.max_concurrency = dict(most)

    # ------------------------------------------------------------ finetuning

    def add_training_adapter(self, key: str, num_elements: int, job_id: str | None = None) -> None:
        """Bring the adapter of a job to the device, as others are; it stays until `remove_job`.

        `job_id` is by default the key without a leading "job:".

        Raises:
            RequestTooLarge: it is larger than training adapters may pin.
            ValueError: the job has one already.
        """
        job_id = key.removeprefix(_JOB_PREFIX) if job_id is None else job_id
        if job_id in self._state.training.jobs or key in self._state.residency.entries:
            raise ValueError(f"training adapter {key} of job {job_id} exists already")
        self._state.residency.want(key, num_elements, is_training=True)
        self._state.training.add_job(job_id, key)

    def add_pack(self, spec: PackSpec, now: float) -> None:
        """Queue a pack of the open step of its job.

        Raises:
            RequestTooLarge: it can never be admitted.
            ValueError: its job has no training adapter, the job's step is closed, or its id is in use.
        """
        if not 1 <= spec.num_tokens <= self.limits.max_pack_tokens:
            raise RequestTooLarge(
                f"pack {spec.pack_id} has {spec.num_tokens} tokens; 1 to {self.limits.max_pack_tokens} fit"
            )
        job = self._state.training.jobs.get(spec.job_id)
        tenant = None if job is None else job.tenant
        self._state.training.add_pack(spec, now)
        if tenant != spec.tenant:
            self._state.join(spec.tenant)
            if tenant is not None:
                self._state.leave(tenant)

    def step_ready(self, job_id: str, now: float) -> None:
        """All packs of the job's current step have been added: its optimizer step follows their backward.

        Raises:
            KeyError: the job is unknown.
        """
        del now  # part of the interface: every event carries its time
        self._state.training.jobs[job_id].step_is_closed = True

    def remove_job(self, job_id: str) -> bool:
        """Drop a job's packs and adapter, at any time; returns False if it is not known."""
        removed = self._state.training.remove_job(job_id)
        if removed is None:
            return False
        job, holders = removed
        if job.tenant is not None:
            self._state.leave(job.tenant)
        for pack in holders:
            self._state.blocks.free(pack.block_ids, pack.last_planned)
            pack.block_ids = ()
        self._state.residency.remove(
            job.adapter, self._in_flight[-1].plan.iteration if self._in_flight else 0
        )
        return True

    # ------------------------------------------------------------ adapters

    def pin_adapter(self, digest: str) -> None:
        """Bring an adapter near and keep it on the device, inside the share that pins may hold.

        Raises:
            ValueError: it is an adapter in training.
        """
        self._state.residency.pin(digest)

    def unpin_adapter(self, digest: str) -> None:
        """Let a pinned adapter leave like any other. Unknown ones are ignored."""
        self._state.residency.unpin(digest)

    def adapter_fetched(self, digest: str, num_elements: int) -> str | None:
        """The adapter's bytes are in host memory: `num_elements` elements. Ignored if no fetch is awaited.

        Returns None, or why it can never be loaded (too large); then `adapter_failed` must follow.
        """
        return self._state.residency.fetched(digest, num_elements)

    def adapter_loaded(self, digest: str) -> None:
        """The adapter is in its extent, its table row is set. Ignored if nobody waits for that any more."""
        self._state.residency.loaded(digest)

    def adapter_failed(self, digest: str) -> list[str]:
        """A fetch or load failed: forget the requests that wait for it and return their ids.

        A later request tries again. The job of a failed training adapter stands still until it is removed.
        """
        if not self._state.residency.failed(digest):
            return []
        waiters = self._state.waiting.of_adapter(digest)
        for sequence in waiters:
            self._state.retire(sequence)
        return [sequence.spec.sequence_id for sequence in waiters]

    # ------------------------------------------------------------ iterations

    def plan(self, now: float) -> StepPlan:
        """Decide the next iteration. A plan that `is_empty` may still have adapter actions and expired
        requests; it needs no commit.

        Raises:
            RuntimeError: `max_inflight` plans are uncommitted.
        """
        if len(self._in_flight) >= self.limits.max_inflight:
            raise RuntimeError(
                f"{len(self._in_flight)} plans are in flight, the most allowed; commit one first"
            )
        state = self._state
        self._iteration += 1
        state.advance(self._committed_before(self._iteration))
        state.shares.advance(state.active)
        expired = self._expire(now)
        bring_adapters_nearer(state, now)
        is_flex = state.num_default == 0 < len(state.sequences)
        sizes = state.residency.places.slot_elements
        draft = PlanDraft(self._iteration, now, self.limits, self.cost, sizes, is_flex=is_flex)
        budget_s = self._policy.fill(state, draft, self._budgets.of(is_flex=is_flex))

        made = self._finish(draft, budget_s, expired)
        if not made.plan.is_empty:
            self._in_flight.append(made)
            self._ledger.charge(made)
        return made.plan

    def _expire(self, now: float) -> tuple[str, ...]:
        """Forget the requests whose deadline has come."""
        expired = self._state.deadlines.take_expired(now)
        for sequence in expired:
            self._state.retire(sequence)
        return tuple(sequence.spec.sequence_id for sequence in expired)

    def _finish(self, draft: PlanDraft, budget_s: float, expired: tuple[str, ...]) -> InFlight:
        """Freeze the draft. Preemptions and drops are reported with the next plan that runs, each once."""
        self.num_preemptions += len(draft.preempted)
        self.num_packs_dropped += len(draft.dropped)
        actions = self._state.residency.take_actions()
        preempted = self._unreported.preempted + tuple(draft.preempted)
        dropped = self._unreported.dropped_packs + tuple(draft.dropped)
        told = MemoryPlan(preempted=preempted, dropped_packs=dropped)
        self._unreported = told if draft.is_empty else MemoryPlan()
        memory = replace(
            MemoryPlan() if draft.is_empty else told,
            adapter_fetches=actions.fetches,
            adapter_loads=actions.loads,
            adapter_moves=actions.moves,
            adapter_evictions=actions.evictions,
        )
        return draft.finish(memory, budget_s, expired)

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[Outcome]:
        """Take in the result of the oldest plan in flight (an empty plan is none) and say what it completed.

        Backward slices and optimizer steps that have not run are planned again.

        Raises:
            ValueError: it is not the oldest plan in flight, a token is missing, or not all has run although
                `max_inflight` is above 1; nothing has changed.
        """
        if plan.is_empty:
            return []
        if not self._in_flight or self._in_flight[0].plan.iteration != plan.iteration:
            raise ValueError(f"iteration {plan.iteration} is not the oldest plan in flight")
        self._in_flight[0].check_result(result)
        num_slices, num_steps = result.num_run(plan)
        is_cut = num_slices < len(plan.backward) or num_steps < len(plan.optimizer_steps)
        if is_cut and self.limits.max_inflight > 1:
            raise ValueError(f"iteration {plan.iteration} must run to its end: the next is planned upon it")
        made = self._in_flight.popleft()
        ran = self._cut(made, num_slices, num_steps) if is_cut else made
        self._state.advance(self._committed_before(self._iteration + 1))
        self.cost.observe(ran.features, result.elapsed_s)
        self._budgets.observe(ran, result.elapsed_s, now)
        self._ledger.settle(made, ran, result.elapsed_s)
        return [*commit_tokens(self._state, ran, result, now), *commit_training(self._state, ran)]

    def _cut(self, made: InFlight, num_slices: int, num_steps: int) -> InFlight:
        """The plan as if no more had been planned than has run; nothing has come after it."""
        withdraw(self._state, made.draft, num_slices, num_steps)
        return made.draft.finish(made.plan.memory, made.plan.budget_s, made.plan.expired)

    def _committed_before(self, iteration: int) -> int:
        """The last iteration up to which all are committed (empty plans count as committed)."""
        return (self._in_flight[0].plan.iteration if self._in_flight else iteration) - 1

    # ------------------------------------------------------------ observation

    @property
    def num_running(self) -> int:
        """Requests admitted."""
        return len(self._state.running)

    @property
    def num_waiting(self) -> int:
        """Requests not admitted (yet, or again)."""
        return len(self._state.waiting)

    def queues(self, now: float, max_tenants: int = 64) -> dict[str, TenantQueue]:
        """The longest queues of waiting requests by tenant, and when they should have drained.

        May be called from another thread than the loop's.
        """
        return self._state.queues(now, max_tenants)

    @property
    def num_packs(self) -> int:
        """Packs whose backward is not committed."""
        return self._state.training.num_packs

    @property
    def num_blocks_held(self) -> int:
        """KV blocks of running requests and packs."""
        return self._state.blocks.num_held

    @property
    def num_prefix_queries(self) -> int:
        """Tokens of admitted requests that were looked for in the prefix cache."""
        return self._state.num_prefix_queries

    @property
    def num_prefix_hits(self) -> int:
        """Tokens of admitted requests that were found in the prefix cache."""
        return self._state.num_prefix_hits

    @property
    def budget(self) -> BudgetController:
        """The latency budget of the default class."""
        return self._budgets.default

    @property
    def flex_budget(self) -> BudgetController:
        """The latency budget while there are flex requests alone."""
        return self._budgets.flex

    @property
    def budget_s(self) -> float:
        """The budget of an iteration with decodes, now."""
        return self.budget.decode_budget_s

    @property
    def service_s(self) -> Mapping[str, float]:
        """Seconds of iterations charged to each tenant so far, inference and finetuning together."""
        return self._ledger.service_s

    @property
    def kv_usage(self) -> float:
        """Part of the KV blocks that is held, 0 to 1."""
        return self._state.blocks.num_held / self.limits.num_blocks

    @property
    def num_adapters_on_device(self) -> int:
        """Adapters that are on the device or being copied there."""
        return self._state.residency.places.num_taken

    @property
    def num_adapters_pinned(self) -> int:
        """Pinned adapters that are on the device or being copied there."""
        return sum(entry.slot is not None for entry in list(self._state.residency.pins.granted.values()))

    @property
    def arena_usage(self) -> float:
        """Part of the adapter arena that is held, 0 to 1."""
        extents = self._state.residency.extents
        return extents.num_held / extents.capacity if extents.capacity else 0.0

    @property
    def max_adapter_elements(self) -> int:
        """The largest adapter that requests may name."""
        return self._state.residency.regions.max_request_elements

    @property
    def max_pinned_elements(self) -> int:
        """Elements that pinned adapters may hold together."""
        return self._state.residency.regions.pinned_elements

    @property
    def max_pinned_adapters(self) -> int:
        """Adapters that may be pinned at a time."""
        return self._state.residency.regions.max_pinned_slots

    @property
    def max_training_adapter_elements(self) -> int:
        """The largest adapter that jobs may train."""
        return self._state.residency.regions.training_elements

    def adapter_slot(self, key: str) -> int | None:
        """The slot of an adapter that is on the device, else None."""
        return self._state.residency.slot(key)

    def has_work(self) -> bool:
        """Whether anything waits, runs or is in flight. True with an empty plan: the next step is the
        engine's.
        """
        state = self._state
        return bool(
            self._in_flight or state.sequences or any(job.has_work for job in state.training.jobs.values())
        )

    def check_invariants(self) -> None:
        """All parts agree with each other; for tests and idle moments.

        Raises:
            AssertionError: they do not.
        """
        self._state.check_invariants()
        assert len(self._in_flight) <= self.limits.max_inflight
