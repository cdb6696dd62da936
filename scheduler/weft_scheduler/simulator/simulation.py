"""Replays a trace and finetune jobs through the real scheduler on a simulated device, in virtual time.

As in the engine: with a pipeline depth of one, a plan is made when the plan before it begins to run, and
committed when it has run; with depth zero, plans are made, run and committed one by one. Time jumps over what
nothing happens in.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop

from weft_scheduler.budget import LatencyTargets
from weft_scheduler.cost import CostModel
from weft_scheduler.limits import Limits
from weft_scheduler.outcomes import PackDone, SequenceToken, StepDone, StepResult
from weft_scheduler.plan import StepPlan
from weft_scheduler.policies import POLICIES, Policy
from weft_scheduler.prefix import PrefixSpec, prefix_root
from weft_scheduler.requests import RequestSpec, RequestTooLarge
from weft_scheduler.scheduler import Scheduler
from weft_scheduler.simulator.device import STOP_TOKEN, SimulatedDevice
from weft_scheduler.simulator.device_model import DeviceModel, calibration_samples
from weft_scheduler.simulator.gpus import Gpu
from weft_scheduler.simulator.jobs import JobSpec, SimulatedJob
from weft_scheduler.simulator.paging import Pager
from weft_scheduler.simulator.recorder import Recorder, Sample
from weft_scheduler.simulator.report import Report, Slo
from weft_scheduler.simulator.timeline import Timeline
from weft_scheduler.simulator.trace import Trace, TraceRequest

DEDICATED_S = 120.0
"""Virtual seconds for which jobs are run without requests, to learn what they reach alone."""

_LONGEST_ANSWER = 1024
"""What requests ask for at least: the scheduler does not know how long an answer will be."""
_EPSILON_S = 1e-9


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything that a simulation follows from, besides its trace.

    `adapter_elements` are the sizes of the adapters that the trace names, `job_elements` of those that jobs
    train. `noise` is that of the device's times. `beliefs` are what the scheduler's cost model is calibrated
    with; by default what the engine would measure on the device at its start. `timeline_s` is the window of
    which every iteration is recorded.
    """

    limits: Limits
    device: DeviceModel
    gpu: Gpu
    slo: Slo = field(default_factory=Slo)
    jobs: tuple[JobSpec, ...] = ()
    policy: str = "weft"
    weights: Mapping[str, float] = field(default_factory=dict)
    adapter_elements: Mapping[str, int] = field(default_factory=dict)
    job_elements: Mapping[str, int] = field(default_factory=dict)
    noise: float = 0.05
    seed: int = 0
    beliefs: CostModel | None = None
    timeline_s: tuple[float, float] = (0.0, 0.0)
    max_pack_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """The report of a simulation, and what its figures are drawn from."""

    report: Report
    samples: tuple[Sample, ...]
    timeline: Timeline


class SimulationStuck(RuntimeError):
    """Work is left, nothing runs and nothing is on its way: a bug of the policy or of the scheduler."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A plan, and it again with those backward slices and optimizer steps alone that have run."""

    plan: StepPlan
    ran: StepPlan
    sampled: dict[str, int]
    seconds: float
    finish_s: float


def simulate(
    trace: Trace, setup: Setup, *, duration_s: float | None = None, policy: Policy | None = None
) -> Result:
    """Run the trace to its end, or for `duration_s`.

    Without a duration it ends with the last request, or, where there are only jobs that end, with the last
    job. `policy` replaces the one that `setup` names (and is named like it in the report).

    Raises:
        ValueError: there is nothing that would ever end it.
        SimulationStuck: see there.
    """
    if duration_s is None and not trace and any(job.num_steps is None for job in setup.jobs):
        raise ValueError("jobs without an end and no requests: give a duration")
    return Simulation(trace, setup, policy or POLICIES[setup.policy]()).run(duration_s)


def simulate_with_dedicated(trace: Trace, setup: Setup, *, duration_s: float | None = None) -> Result:
    """As `simulate`, with the rate that the same jobs reach without requests in the report."""
    result = simulate(trace, setup, duration_s=duration_s)
    return replace(result, report=replace(result.report, dedicated_per_s=dedicated_rate(setup)))


def dedicated_rate(setup: Setup, duration_s: float = DEDICATED_S) -> float | None:
    """Tokens a second that the jobs reach without requests, under Weft's policy; None without jobs."""
    if not setup.jobs:
        return None
    endless = tuple(replace(job, num_steps=None, start_s=0.0) for job in setup.jobs)
    alone = replace(setup, jobs=endless, policy="weft", timeline_s=(0.0, 0.0))
    return simulate((), alone, duration_s=duration_s).report.trained_per_s


def _prefix(idx: int, request: TraceRequest) -> PrefixSpec | None:
    """Token ids that are equal where the trace's hashes are; None for a trace that has none."""
    if not request.prefix_hashes:
        return None
    tokens = array("q")
    for block_hash in request.prefix_hashes:
        tokens.extend([block_hash] * request.prefix_block_tokens)
    del tokens[request.num_prompt_tokens :]
    # What no hash covers is this request's own.
    tokens.extend([-1 - idx] * (request.num_prompt_tokens - len(tokens)))
    return PrefixSpec(prefix_root(request.tenant, request.adapter), tokens)


class Simulation:
    """One run. `run` is called once."""

    def __init__(self, trace: Sequence[TraceRequest], setup: Setup, policy: Policy) -> None:
        """Build scheduler, device and pager as the engine does at its start."""
        self._setup = setup
        limits = setup.limits
        cost = setup.beliefs or CostModel()
        if setup.beliefs is None:
            largest = max([*setup.adapter_elements.values(), *setup.job_elements.values()], default=0)
            cost.calibrate(calibration_samples(setup.device, limits, largest))
        slo = setup.slo
        targets = LatencyTargets(slo.tpot_s, slo.ttft_s, slo.percentile)
        self._scheduler = Scheduler(limits, cost, targets, setup.weights, policy)
        self._slots: dict[int, int] = {}
        self._device = SimulatedDevice(
            setup.device,
            window_tokens=limits.window_tokens,
            elements_by_slot=self._slots,
            noise=setup.noise,
            seed=setup.seed,
        )
        self._elements = {**setup.adapter_elements}
        self._pager = Pager(setup.gpu, self._elements)
        self._recorder = Recorder(setup.weights)
        self._timeline = Timeline(*setup.timeline_s, limits.num_layers, limits.window_tokens)
        self._arrivals = deque(enumerate(trace))
        self._waiting_jobs = [(job.start_s, idx) for idx, job in enumerate(setup.jobs)]
        heapify(self._waiting_jobs)
        self._jobs: dict[str, SimulatedJob] = {}
        self._pack_tokens: dict[str, tuple[str, int]] = {}
        self._tenant_of: dict[str, str] = {}
        self._flights: deque[_Flight] = deque()
        self._now = 0.0
        self._device_free_s = 0.0
        self._training_since_s: float | None = None
        self._training_s = 0.0
        self._num_empty = 0

    def run(self, duration_s: float | None) -> Result:
        """Step until the end."""
        while not self._is_over(duration_s):
            self._step(duration_s)
        while self._flights and duration_s is None:
            self._commit()
        if duration_s is not None:
            self._now = duration_s
        self._pause_training()
        recorder = self._recorder
        report = recorder.report(
            policy=self._setup.policy,
            scheduler=self._scheduler,
            slo=self._setup.slo,
            duration_s=max(self._now, _EPSILON_S),
            training_s=self._training_s,
            num_adapter_loads=self._pager.num_loads,
        )
        return Result(report, tuple(recorder.samples), self._timeline)

    def _is_over(self, duration_s: float | None) -> bool:
        if duration_s is not None:
            return self._now >= duration_s
        if self._arrivals or self._tenant_of:
            return False
        has_requests = bool(self._recorder.records) or bool(self._recorder.num_refused)
        return has_requests or not (self._jobs or self._waiting_jobs)

    # ------------------------------------------------------------ one iteration

    def _step(self, duration_s: float | None) -> None:
        self._deliver()
        plan = self._scheduler.plan(self._now)
        self._carry_out(plan)
        if plan.is_empty:
            self._wait(duration_s)
            return
        self._num_empty = 0
        stepped = sum(self._setup.job_elements[job_id] for job_id in plan.optimizer_steps)
        start_s = max(self._now, self._device_free_s)
        sampled, seconds, work = self._device.run(plan, stepped, self._stop_s(start_s))
        self._device_free_s = start_s + seconds
        ran = plan
        if work.num_backward_slices < len(plan.backward):
            ran = replace(plan, backward=plan.backward[: work.num_backward_slices], optimizer_steps=())
        self._timeline.record(ran, start_s, self._device_free_s, self._tenant_of, self._pack_tokens)
        self._flights.append(_Flight(plan, ran, sampled, seconds, self._device_free_s))
        self._recorder.iteration(seconds, self._scheduler.kv_usage)
        while len(self._flights) >= self._scheduler.limits.max_inflight:
            self._commit()

    def _stop_s(self, start_s: float) -> float | None:
        """After how many seconds an iteration that starts then gives way to an arrival.

        As in the engine, only where no later plan counts on what it does.
        """
        if self._scheduler.limits.max_inflight > 1 or not self._arrivals:
            return None
        return self._arrivals[0][1].arrival_s - start_s

    def _wait(self, duration_s: float | None) -> None:
        """Nothing to run: commit what runs, or let time pass until something happens."""
        if self._flights:
            self._commit()
            return
        times = [self._pager.next_due_s, duration_s]
        times.append(self._arrivals[0][1].arrival_s if self._arrivals else None)
        times.append(self._waiting_jobs[0][0] if self._waiting_jobs else None)
        coming = [time_s for time_s in times if time_s is not None]
        if not coming and self._is_over(duration_s):
            return
        self._num_empty += 1
        if not coming or self._num_empty > 10_000:
            raise SimulationStuck(
                f"at {self._now:.3f} s {self._scheduler.num_waiting} requests wait, "
                f"{self._scheduler.num_running} run, {self._scheduler.num_packs} packs are open, and "
                "nothing can be planned"
            )
        self._now = max(self._now + _EPSILON_S, min(coming))

    def _deliver(self) -> None:
        """Arrivals, jobs and adapters that are due."""
        while self._arrivals and self._arrivals[0][1].arrival_s <= self._now:
            self._arrive(*self._arrivals.popleft())
        while self._waiting_jobs and self._waiting_jobs[0][0] <= self._now:
            self._start_job(self._setup.jobs[heappop(self._waiting_jobs)[1]])
        for arrival in self._pager.due(self._now):
            if arrival.kind == "fetch":
                refusal = self._scheduler.adapter_fetched(arrival.adapter, self._elements[arrival.adapter])
                if refusal is not None:
                    self._refuse_waiters(arrival.adapter)
            else:
                self._scheduler.adapter_loaded(arrival.adapter)

    def _arrive(self, idx: int, request: TraceRequest) -> None:
        limits, sequence_id = self._scheduler.limits, f"r{idx}"
        adapter = request.adapter
        room = limits.max_model_len - request.num_prompt_tokens
        spec = RequestSpec(
            sequence_id=sequence_id,
            tenant=request.tenant,
            num_prompt_tokens=request.num_prompt_tokens,
            max_new_tokens=max(1, min(max(request.num_output_tokens, _LONGEST_ANSWER), room)),
            stop_token_ids=frozenset((STOP_TOKEN,)),
            adapter=adapter,
            prefix=_prefix(idx, request),
        )
        was_resident = None if adapter is None else self._scheduler.adapter_slot(adapter) is not None
        try:
            self._scheduler.add_request(spec, self._now)
        except RequestTooLarge:
            self._recorder.num_refused += 1
            return
        self._device.add_sequence(sequence_id, request.num_output_tokens)
        self._tenant_of[sequence_id] = request.tenant
        self._recorder.arrived(sequence_id, request, was_resident)

    def _refuse_waiters(self, adapter: str) -> None:
        for sequence_id in self._scheduler.adapter_failed(adapter):
            self._forget(sequence_id)

    def _forget(self, sequence_id: str) -> None:
        self._device.remove_sequence(sequence_id)
        del self._tenant_of[sequence_id]

    def _carry_out(self, plan: StepPlan) -> None:
        for _, slot in plan.memory.adapter_evictions:
            del self._slots[slot]
        for load in plan.memory.adapter_loads:
            self._slots[load.slot] = load.num_elements
        if plan.memory.adapter_loads or plan.memory.adapter_fetches:
            self._pager.carry_out(plan.memory, self._now)

    # ------------------------------------------------------------ results

    def _commit(self) -> None:
        flight = self._flights.popleft()
        self._now = max(self._now, flight.finish_s)
        num_run = len(flight.ran.backward), len(flight.ran.optimizer_steps)
        result = StepResult(flight.sampled, flight.seconds, *num_run)
        self._count_backward(flight.ran)
        got_token: list[str] = []
        for outcome in self._scheduler.commit(flight.plan, result, self._now):
            if isinstance(outcome, SequenceToken):
                got_token.append(outcome.sequence_id)
                if outcome.finish_reason is not None:
                    self._recorder.records[outcome.sequence_id].finished_s = self._now
                    self._forget(outcome.sequence_id)
            elif isinstance(outcome, PackDone):
                self._device.remove_pack(outcome.pack_id)
                self._pack_tokens.pop(outcome.pack_id)
            elif isinstance(outcome, StepDone):
                self._step_done(outcome.job_id)
        self._recorder.tokens(got_token, self._now)
        self._recorder.sample(self._scheduler, self._now)

    def _count_backward(self, plan: StepPlan) -> None:
        window, num_layers = self._scheduler.limits.window_tokens, self._scheduler.limits.num_layers
        token_layers: dict[str, int] = {}
        for part in plan.backward:
            for pack_id in part.pack_ids:
                tenant, num_tokens = self._pack_tokens[pack_id]
                tokens = min(window, num_tokens - part.window * window)
                token_layers[tenant] = token_layers.get(tenant, 0) + tokens
        for tenant, total in token_layers.items():
            self._recorder.trained(tenant, total / num_layers)

    # ------------------------------------------------------------ jobs

    def _start_job(self, spec: JobSpec) -> None:
        most = self._setup.max_pack_tokens or self._setup.gpu.max_pack_tokens
        most = min(most, self._scheduler.limits.max_pack_tokens)
        elements = self._setup.job_elements[spec.job_id]
        self._elements[spec.adapter_key] = elements
        self._jobs[spec.job_id] = SimulatedJob(spec, max_pack_tokens=most, seed=self._setup.seed)
        self._scheduler.add_training_adapter(spec.adapter_key, elements)
        self._recorder.trained(spec.tenant, 0.0)
        if self._training_since_s is None:
            self._training_since_s = self._now
        self._next_step(spec.job_id)

    def _next_step(self, job_id: str) -> None:
        for pack in self._jobs[job_id].next_step():
            self._device.add_pack(pack, self._setup.job_elements[job_id])
            self._pack_tokens[pack.pack_id] = (pack.tenant, pack.num_tokens)
            self._scheduler.add_pack(pack, self._now)
        self._scheduler.step_ready(job_id, self._now)

    def _step_done(self, job_id: str) -> None:
        job = self._jobs[job_id]
        job.num_steps_done += 1
        self._recorder.num_steps += 1
        if not job.is_finished:
            self._next_step(job_id)
            return
        self._scheduler.remove_job(job_id)
        del self._jobs[job_id]
        if not self._jobs:
            self._pause_training()

    def _pause_training(self) -> None:
        """Count the time for which there were jobs."""
        if self._training_since_s is not None:
            self._training_s += self._now - self._training_since_s
            self._training_since_s = None
