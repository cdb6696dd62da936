"""A simulated engine that carries out plans and watches, from outside, that they are sound.

It keeps what a device would keep: what is in every cell of the KV cache (the tenant, the adapter and all the
tokens that keys and values depend on), which adapter lies in every extent and slot, which windows and slices
of every pack have run. It shares no code with the scheduler.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from weft_scheduler import (
    CostModel,
    LatencyTargets,
    Limits,
    PackDone,
    PackSpec,
    PrefixSpec,
    RequestSpec,
    Scheduler,
    SegmentKind,
    SequenceToken,
    StepDone,
    StepPlan,
    StepResult,
    prefix_root,
)

STOP = 7
OTHER = 1


@dataclass
class Request:
    """What was asked and what has come back."""

    spec: RequestSpec
    arrival_s: float
    stop_after: int | None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_cached: int | None = None
    contents: list[int] = field(default_factory=list)

    def token(self, position: int) -> int:
        """The token at a position; those that are to be generated are known here beforehand."""
        idx = position - self.spec.num_prompt_tokens
        if idx >= 0:
            return self.generated(idx)
        return 0 if self.spec.prefix is None else self.spec.prefix.token_ids[position]

    def generated(self, idx: int) -> int:
        return STOP if self.stop_after is not None and idx + 1 >= self.stop_after else OTHER


@dataclass
class PackRecord:
    """Windows and slices of one pack, in the order in which they ran."""

    spec: PackSpec
    num_windows: int
    num_forwarded: int = 0
    block_ids: tuple[int, ...] = ()
    has_loss: bool = False
    keeps_activations: bool = False
    slices: list[tuple[int, int]] = field(default_factory=list)
    is_done: bool = False
    num_drops: int = 0


@dataclass
class Flight:
    """A plan under way, how many of its slices and optimizer steps run, and who reads and writes which blocks
    and slots.
    """

    plan: StepPlan
    num_slices: int
    num_steps: int
    readers: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    writers: dict[int, str] = field(default_factory=dict)
    written: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    slots: set[int] = field(default_factory=set)


class SimulatedEngine:
    """Runs a scheduler on a simulated clock; `latency` draws the seconds that a fetch or load takes."""

    def __init__(self, limits: Limits, seed: int, targets: LatencyTargets, **options: Any) -> None:
        self.limits = limits
        self.random = random.Random(seed)
        self.latency: Callable[[], float] = options.pop("latency", lambda: 0.0)
        self.noise: float = options.pop("noise", 0.1)
        self.nan_rate: float = options.pop("nan_rate", 0.0)
        self.cut_rate: float = options.pop("cut_rate", 0.0)
        self.num_cuts = 0
        self.adapter_elements: dict[str, int] = {}
        self.scheduler = Scheduler(limits, CostModel(), targets, **options)
        self.now = self.charged_s = 0.0
        self.flights: deque[Flight] = deque()
        self.requests: dict[str, Request] = {}
        self.packs: dict[str, PackRecord] = {}
        self.open_packs: dict[str, set[str]] = {}
        self.steps_done: dict[str, int] = {}
        self.steps_asked: dict[str, int] = {}
        self.cells: dict[int, object] = {}
        self.nodes: dict[tuple[object, int], int] = {}
        self.slots: dict[int, str] = {}
        self.extents: dict[str, tuple[int, int]] = {}
        self.pending: list[tuple[float, str, str]] = []
        self.fetching: set[str] = set()
        self.failing: set[str] = set()
        self.aborted: set[str] = set()
        self.expired: dict[str, Request] = {}
        self.plans: list[StepPlan] = []
        self.endless: dict[str, tuple[str, list[int]]] = {}

    # ------------------------------------------------------------ work

    def request(self, spec: RequestSpec, stop_after: int | None = None) -> None:
        if spec.adapter is not None:
            self.adapter_elements.setdefault(spec.adapter, max(spec.adapter_elements, 64))
        self.scheduler.add_request(spec, self.now)
        self.requests[spec.sequence_id] = Request(spec, self.now, stop_after)

    def abort(self, sequence_id: str) -> None:
        request = self.requests[sequence_id]
        assert self.scheduler.abort(sequence_id) == (request.finish_reason is None)
        if request.finish_reason is None:
            self.lose(sequence_id)

    def lose(self, sequence_id: str) -> None:
        """A request is gone. What plans under way write of it may be skipped, or be wrong."""
        self.aborted.add(sequence_id)
        del self.requests[sequence_id]
        for flight in self.flights:
            self.cells.update(dict.fromkeys(flight.written[sequence_id], "void"))

    def add_job(self, job_id: str, num_elements: int) -> None:
        self.adapter_elements[f"job:{job_id}"] = num_elements
        self.scheduler.add_training_adapter(f"job:{job_id}", num_elements)
        self.open_packs[job_id] = set()
        self.steps_done[job_id] = self.steps_asked[job_id] = 0

    def add_step(self, job_id: str, tenant: str, sizes: list[int]) -> None:
        for idx, num_tokens in enumerate(sizes):
            pack_id = f"{job_id}/{self.steps_done[job_id]}/{idx}"
            spec = PackSpec(pack_id, job_id, tenant, num_tokens, f"job:{job_id}", num_tokens)
            self.scheduler.add_pack(spec, self.now)
            self.packs[pack_id] = PackRecord(spec, -(-num_tokens // self.limits.window_tokens))
            self.open_packs[job_id].add(pack_id)
        self.scheduler.step_ready(job_id, self.now)
        self.steps_asked[job_id] = self.steps_done[job_id] + 1

    def train_endlessly(self, job_id: str, tenant: str, sizes: list[int]) -> None:
        """A job whose next step of such packs begins when one is done."""
        self.add_job(job_id, 64)
        self.endless[job_id] = (tenant, sizes)
        self.add_step(job_id, tenant, sizes)

    def job_has_work(self, job_id: str) -> bool:
        return self.steps_asked[job_id] > self.steps_done[job_id]

    def remove_job(self, job_id: str) -> None:
        assert self.scheduler.remove_job(job_id)
        for pack_id in self.open_packs.pop(job_id):
            del self.packs[pack_id]
        del self.steps_done[job_id]

    # ------------------------------------------------------------ iterations

    def step(self) -> StepPlan:
        """Make a plan; first commit the oldest if as many are under way as may be."""
        self.deliver()
        if len(self.flights) == self.limits.max_inflight:
            self.commit()
        plan = self.make_plan()
        if plan.is_empty:
            if self.flights:
                self.commit()
            else:
                self.now = max(self.now + 0.01, min((due for due, _, _ in self.pending), default=0.0))
        return plan

    def run(self, max_steps: int = 20_000) -> None:
        """Step until nothing is left."""
        for _ in range(max_steps):
            if not self.scheduler.has_work():
                break
            self.step()
            self.scheduler.check_invariants()
        assert not self.scheduler.has_work(), "work is left"
        self.deliver()

    def make_plan(self) -> StepPlan:
        plan = self.scheduler.plan(self.now)
        self.plans.append(plan)
        for sequence_id in plan.expired:
            request = self.expired[sequence_id] = self.requests.pop(sequence_id)
            assert request.finish_reason is None
            assert request.spec.deadline_s is not None
            assert request.spec.deadline_s <= self.now
        self.carry_out(plan)
        if plan.is_empty:
            assert not plan.memory.preempted
            assert not plan.memory.dropped_packs
        else:
            self.flights.append(self.execute(plan))
        self.check_budget(plan)
        return plan

    def deliver(self) -> None:
        """Report fetches and loads that are due."""
        due = [item for item in self.pending if item[0] <= self.now]
        self.pending = [item for item in self.pending if item[0] > self.now]
        for _, what, key in due:
            if what == "fetch":
                self.fetching.discard(key)
                if key in self.failing:
                    for sequence_id in self.scheduler.adapter_failed(key):
                        self.lose(sequence_id)
                elif self.scheduler.adapter_fetched(key, self.adapter_elements[key]) is not None:
                    assert not self.scheduler.adapter_failed(key), "only pins are refused here"
            else:
                self.scheduler.adapter_loaded(key)

    def carry_out(self, plan: StepPlan) -> None:
        in_use = set().union(*(flight.slots for flight in self.flights)) if self.flights else set()
        for key, slot in plan.memory.adapter_evictions:
            assert self.slots[slot] == key
            assert slot not in in_use, "evicted under a plan in flight"
            del self.slots[slot]
            del self.extents[key]
        self.carry_out_moves(plan, in_use)
        for load in plan.memory.adapter_loads:
            assert load.slot not in self.slots
            assert 0 <= load.slot < self.limits.num_adapter_slots
            end = load.offset + load.num_elements
            assert load.offset % 64 == 0
            assert 0 <= load.offset < end <= self.limits.arena_elements
            for start, other_end in self.extents.values():
                assert end <= start or other_end <= load.offset, "extents overlap"
            self.slots[load.slot] = load.adapter
            self.extents[load.adapter] = (load.offset, end)
            self.pending.append((self.now + self.latency(), "load", load.adapter))
        for key in plan.memory.adapter_fetches:
            assert key not in self.fetching or key.startswith("job:")
            self.fetching.add(key)
            self.pending.append((self.now + self.latency(), "fetch", key))

    def carry_out_moves(self, plan: StepPlan, in_use: set[int]) -> None:
        """One after the other, each onto room that is free by then; the bytes moved are bounded."""
        for move in plan.memory.adapter_moves:
            assert self.slots[move.slot] == move.adapter
            assert move.slot not in in_use, "moved under a plan in flight"
            assert not move.adapter.startswith("job:"), "a training adapter is moved"
            assert (what := ("load", move.adapter)) not in [item[1:] for item in self.pending], what
            assert self.extents.pop(move.adapter) == (move.source, move.source + move.num_elements)
            end = move.destination + move.num_elements
            assert 0 <= move.destination < end <= self.limits.arena_elements
            for start, other_end in self.extents.values():
                assert end <= start or other_end <= move.destination, "moved onto another"
            self.extents[move.adapter] = (move.destination, end)
        moved = sum(move.num_elements for move in plan.memory.adapter_moves)
        assert moved <= self.limits.arena_elements / 8 or len(plan.memory.adapter_moves) == 1

    def execute(self, plan: StepPlan) -> Flight:
        flight = Flight(plan, *self.draw_cut(plan))
        for pack_id in plan.memory.dropped_packs:
            if pack_id in self.packs:
                record = self.packs[pack_id]
                record.num_drops += 1
                record.num_forwarded = 0
                if record.slices:
                    assert record.slices[-1][1] == 0, "dropped inside a layer"
        generated = [s.sequence_id for s in plan.forward if s.kind is not SegmentKind.TRAIN]
        assert len(set(generated)) == len(generated)
        assert plan.num_forward_tokens <= self.limits.max_batch_tokens
        for segment in plan.forward:
            self.execute_segment(segment, flight)
        for part in plan.backward[: flight.num_slices]:
            self.execute_slice(part)
        for block_id, writer in flight.writers.items():
            assert flight.readers[block_id] == {writer}, "a block that is written is in two tables"
        for other in self.flights:
            for block_id, writer in flight.writers.items():
                assert other.readers.get(block_id, {writer}) == {writer}, "reused under a plan in flight"
            for block_id, readers in flight.readers.items():
                writer = other.writers.get(block_id)
                assert writer is None or readers == {writer}, "shared before it was committed"
        flight.slots = {s.adapter_slot for s in plan.forward if s.adapter_slot is not None}
        jobs = {self.packs[p].spec.job_id for part in plan.backward for p in part.pack_ids}
        for job_id in [*jobs, *plan.optimizer_steps]:
            slot = self.scheduler.adapter_slot(f"job:{job_id}")
            assert slot is not None
            flight.slots.add(slot)
        return flight

    def draw_cut(self, plan: StepPlan) -> tuple[int, int]:
        """How many slices and optimizer steps run before something arrives."""
        num_slices, num_steps = len(plan.backward), len(plan.optimizer_steps)
        if num_slices + num_steps and self.random.random() < self.cut_rate:
            self.num_cuts += 1
            units = self.random.randrange(num_slices + num_steps)
            return min(units, num_slices), max(0, units - num_slices)
        return num_slices, num_steps

    def content(self, name: str, position: int) -> object:
        """What belongs into a token's cell: a number for its tenant, adapter, itself and all before it."""
        if name in self.packs:
            return (name, position)
        request = self.requests[name]
        spec, contents = request.spec, request.contents
        while len(contents) <= position:
            root = name if spec.prefix is None else (spec.tenant, spec.adapter)
            step = (contents[-1] if contents else root, request.token(len(contents)))
            contents.append(self.nodes.setdefault(step, len(self.nodes)))
        return contents[position]

    def execute_segment(self, segment: Any, flight: Flight) -> None:
        name, size = segment.sequence_id, self.limits.block_size
        end = segment.start + segment.num_tokens
        assert len(segment.block_ids) * size >= end
        assert len(set(segment.block_ids)) == len(segment.block_ids)
        for idx, block_id in enumerate(segment.block_ids):
            flight.readers[block_id].add(name)
            if idx >= segment.start // size:
                assert flight.writers.setdefault(block_id, name) == name, "two write one block"
        for position in range(end):
            cell = segment.block_ids[position // size] * size + position % size
            if position >= segment.start:
                self.cells[cell] = self.content(name, position)
                flight.written[name].append(cell)
            assert self.cells.get(cell) == self.content(name, position), "reads something else"
        if segment.kind is SegmentKind.TRAIN:
            record = self.packs[name]
            adapter: str | None = record.spec.adapter
            assert segment.start == record.num_forwarded
            assert segment.start == 0 or segment.keeps_activations is record.keeps_activations
            record.keeps_activations = segment.keeps_activations
            assert segment.num_tokens >= min(16, self.limits.window_tokens) or end == record.spec.num_tokens
            assert segment.with_loss is not record.has_loss
            assert not segment.samples
            record.num_forwarded = end
            record.block_ids = segment.block_ids
            record.has_loss |= end == record.spec.num_tokens
        else:
            request = self.requests[name]
            adapter = request.spec.adapter
            assert not segment.with_loss
            assert segment.kind is SegmentKind.PREFILL or segment.samples
            num_known = request.spec.num_prompt_tokens + len(request.tokens)
            if request.num_cached is None:
                request.num_cached = segment.start
            if segment.kind is SegmentKind.DECODE:
                in_flight = sum(
                    s.sequence_id == name and s.samples for f in self.flights for s in f.plan.forward
                )
                assert (segment.start, segment.num_tokens) == (num_known + in_flight - 1, 1)
            else:
                assert end <= num_known, "a prompt of tokens that are not known yet"
        assert (None if segment.adapter_slot is None else self.slots[segment.adapter_slot]) == adapter

    def execute_slice(self, part: Any) -> None:
        assert part.pack_ids
        assert len({self.packs[pack_id].keeps_activations for pack_id in part.pack_ids}) == 1
        for pack_id in part.pack_ids:
            record = self.packs[pack_id]
            assert record.num_forwarded == record.spec.num_tokens, "backward before forward"
            assert self.scheduler.adapter_slot(record.spec.adapter) is not None
            last = self.limits.num_layers - 1
            order = [
                (layer, window)
                for layer in range(last, -1, -1)
                for window in range(record.num_windows - 1, -1, -1)
            ]
            assert order[len(record.slices)] == (part.layer, part.window), "slice out of order"
            record.slices.append((part.layer, part.window))
            for position in range(record.spec.num_tokens):
                block_id = record.block_ids[position // self.limits.block_size]
                cell = block_id * self.limits.block_size + position % self.limits.block_size
                assert self.cells[cell] == self.content(pack_id, position), "the pack lost its blocks"

    def commit(self) -> None:
        flight = self.flights.popleft()
        plan = flight.plan
        for name in [s.sequence_id for s in plan.forward if s.samples]:
            is_alive = name in self.requests and self.requests[name].finish_reason is None
            if is_alive and self.random.random() < self.nan_rate:
                assert self.scheduler.fail(name)
                self.cells.update(dict.fromkeys(flight.written[name], "void"))
                self.lose(name)
        elapsed_s = max(plan.predicted_s * self.random.uniform(1 - self.noise, 1 + self.noise), 1e-4)
        self.now += elapsed_s
        if plan.forward or flight.num_slices or flight.num_steps:
            self.charged_s += elapsed_s
        sampled = {s.sequence_id: self.next_token(s) for s in plan.forward if s.samples}
        result = StepResult(sampled, elapsed_s, flight.num_slices, flight.num_steps)
        outcomes = self.scheduler.commit(plan, result, self.now)
        stepped = [o.job_id for o in outcomes if isinstance(o, StepDone)]
        ran = plan.optimizer_steps[: flight.num_steps]
        assert stepped == [job_id for job_id in ran if job_id in self.open_packs]
        for outcome in outcomes:
            self.take(outcome)
        told = [o.sequence_id for o in outcomes if isinstance(o, SequenceToken)]
        assert len(set(told)) == len(told)

    def next_token(self, segment: Any) -> int:
        request = self.requests.get(segment.sequence_id)
        if request is None:
            return OTHER
        return request.token(segment.start + segment.num_tokens)

    def take(self, outcome: Any) -> None:
        if isinstance(outcome, SequenceToken):
            request = self.requests[outcome.sequence_id]
            assert request.finish_reason is None, "a token after the end"
            request.tokens.append(outcome.token_id)
            assert outcome.num_cached_tokens == request.num_cached
            request.finish_reason = outcome.finish_reason
            if request.first_token_s is None:
                request.first_token_s = self.now
            if outcome.finish_reason is not None:
                request.finished_s = self.now
        elif isinstance(outcome, PackDone):
            record = self.packs[outcome.pack_id]
            assert len(record.slices) == record.num_windows * self.limits.num_layers
            record.is_done = True
            self.open_packs[record.spec.job_id].discard(outcome.pack_id)
        elif isinstance(outcome, StepDone):
            assert not self.open_packs[outcome.job_id], "optimizer step before the end of backward"
            self.steps_done[outcome.job_id] += 1
            if outcome.job_id in self.endless:
                self.add_step(outcome.job_id, *self.endless[outcome.job_id])

    # ------------------------------------------------------------ checks

    def check_budget(self, plan: StepPlan) -> None:
        """Beyond the budget only decodes, the least chunk of prompts, and one unit (or one layer) of
        finetuning.
        """
        if plan.predicted_s <= plan.budget_s * (1 + 1e-9):
            return
        prompt = sum(s.num_tokens for s in plan.forward if s.kind is SegmentKind.PREFILL)
        windows = sum(s.kind is SegmentKind.TRAIN for s in plan.forward)
        units = windows + len(plan.backward) + len(plan.optimizer_steps)
        assert prompt <= 64
        one_layer = len({(part.wave_id, part.layer) for part in plan.backward}) == 1
        assert units <= 1 or (one_layer and units == len(plan.backward))

    def check_finished(self) -> None:
        """Every request has ended as it should."""
        for request in self.requests.values():
            spec = request.spec
            room = self.limits.max_model_len - spec.num_prompt_tokens
            most = min(spec.max_new_tokens, room)
            due = most if request.stop_after is None else max(request.stop_after, spec.min_new_tokens)
            stops = request.stop_after is not None and due <= most
            assert request.finish_reason == ("stop" if stops else "length"), request
            assert len(request.tokens) == min(due, most), request


@pytest.fixture
def make_limits() -> Callable[..., Limits]:
    """Small limits, any of them overridden."""

    def make(**overrides: Any) -> Limits:
        sizes: dict[str, Any] = {
            "num_blocks": 64,
            "block_size": 4,
            "max_num_seqs": 8,
            "max_batch_tokens": 64,
            "max_model_len": 128,
            "num_adapter_slots": 4,
            "arena_elements": 64 * 64,
            "window_tokens": 8,
            "num_layers": 3,
            "max_train_tokens": 96,
            "inference_reserve_blocks": 8,
        }
        return Limits(**(sizes | overrides))

    return make


@pytest.fixture
def make_engine(make_limits: Callable[..., Limits]) -> Callable[..., SimulatedEngine]:
    """A simulated engine over small limits."""

    def make(seed: int = 0, targets: LatencyTargets | None = None, **overrides: Any) -> SimulatedEngine:
        names = ("latency", "noise", "nan_rate", "cut_rate", "tenant_weights", "policy")
        options = {key: overrides.pop(key) for key in names if key in overrides}
        targets = targets or LatencyTargets(tpot_s=0.05, ttft_s=2.0)
        return SimulatedEngine(make_limits(**overrides), seed, targets, **options)

    return make


@pytest.fixture
def request_spec() -> Callable[..., RequestSpec]:
    """A request of ten prompt and five new tokens on the base model, anything overridden.

    With `token_ids` it uses the prefix cache; `is_read` as in `PrefixSpec`.
    """

    def make(
        sequence_id: str, token_ids: list[int] | None = None, is_read: bool = True, **overrides: Any
    ) -> RequestSpec:
        fields: dict[str, Any] = {
            "tenant": "t",
            "num_prompt_tokens": 10,
            "max_new_tokens": 5,
            "stop_token_ids": frozenset({STOP}),
        }
        if token_ids is not None:
            root = prefix_root(overrides.get("tenant", "t"), overrides.get("adapter"))
            fields |= {
                "num_prompt_tokens": len(token_ids),
                "prefix": PrefixSpec(root, token_ids, is_read),
            }
        return RequestSpec(sequence_id, **(fields | overrides))

    return make
