"""Bounded queues: who is refused when they are full, and what is said of the wait."""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from weft_scheduler import (
    CostModel,
    LatencyTargets,
    Limits,
    RequestSpec,
    Scheduler,
    SequenceToken,
    StepResult,
)
from weft_server.errors import InvalidRequest, Overloaded
from weft_server.service.admission import Admission, QueueLimits, Reason, Ticket


class Door:
    """An admission control with what became of everybody."""

    def __init__(self, per_tenant: int, total: int, **options: Any) -> None:
        self.reasons: list[tuple[str, Reason, int]] = []
        self.control = Admission(
            QueueLimits(per_tenant, total),
            on_refused=lambda tenant, reason, num: self.reasons.append((tenant, reason, num)),
            **options,
        )
        self.refused: dict[str, Overloaded] = {}
        self.tickets: dict[str, Ticket] = {}

    def enter(self, name: str, tenant: str = "t", *, flex: bool = False, num: int = 1) -> bool:
        """Whether the request was let in; whoever had to go is in `refused`."""
        refuse = self.refused.__setitem__
        try:
            self.tickets[name] = self.control.enter(
                tenant, "flex" if flex else "default", set(range(num)), lambda error: refuse(name, error)
            )
        except Overloaded as error:
            refuse(name, error)
            return False
        return True


# ---------------------------------------------------------------- one tenant's queue


def test_a_full_queue_refuses_the_newcomer_and_tells_number_limit_and_wait() -> None:
    door = Door(3, 100, drain_s=lambda _tenant, num: 7.2 * num)
    assert all(door.enter(f"r{idx}") for idx in range(3))
    assert not door.enter("late")
    error = door.refused["late"]
    assert (error.status, error.code) == (429, "queue_full")
    assert error.retry_after_s == pytest.approx(4 * 7.2)
    assert "4 choices" in error.message
    assert "limit is 3 (--max-queued-requests)" in error.message
    assert "29 s" in error.message
    assert door.reasons == [("t", Reason.TENANT_QUEUE, 1)]
    assert door.control.num_waiting("t") == 3


@pytest.mark.parametrize(("drain_s", "told"), [(None, 1.0), (0.01, 1.0), (44.0, 44.0), (9999.0, 120.0)])
def test_the_wait_stays_where_clients_obey_it(drain_s: float | None, told: float) -> None:
    door = Door(1, 100, drain_s=lambda _tenant, _num: drain_s)
    door.enter("a")
    door.enter("b")
    assert door.refused["b"].retry_after_s == told


def test_a_first_token_or_an_end_makes_room() -> None:
    door = Door(2, 100)
    door.enter("a", num=2)
    assert not door.enter("b")
    door.control.begin(door.tickets["a"], 0)
    assert door.enter("c")
    door.control.begin(door.tickets["a"], 0)
    assert not door.enter("d"), "a choice begins once"
    door.control.leave(door.tickets["a"])
    door.control.leave(door.tickets["a"])
    assert door.enter("e")
    assert not door.enter("f")


def test_of_one_tenant_flex_goes_before_default_and_the_newest_first() -> None:
    door = Door(3, 100)
    door.enter("f0", flex=True)
    door.enter("f1", flex=True)
    door.enter("d0")
    assert door.enter("d1")
    assert list(door.refused) == ["f1"]
    assert not door.enter("f2", flex=True)
    assert door.enter("d2")
    assert not door.enter("d3")
    assert list(door.refused) == ["f1", "f2", "f0", "d3"]


def test_nobody_goes_for_a_newcomer_that_cannot_be_let_in_anyway() -> None:
    door = Door(4, 100)
    door.enter("f", flex=True)
    door.enter("d", num=3)
    assert not door.enter("large", num=3)
    assert list(door.refused) == ["large"]


def test_an_answer_that_has_begun_is_never_refused() -> None:
    door = Door(2, 100)
    door.enter("f", flex=True, num=2)
    door.control.begin(door.tickets["f"])
    assert not door.enter("d")
    assert list(door.refused) == ["d"]


def test_more_choices_than_may_ever_wait_are_no_matter_of_waiting() -> None:
    door = Door(5, 3)
    with pytest.raises(InvalidRequest, match="4 choices; at most 3") as caught:
        door.enter("r", num=4)
    assert caught.value.code == "too_many_choices"
    assert door.control.num_waiting("t") == 0


# ---------------------------------------------------------------- all queues


def test_the_tenant_with_the_longest_queue_for_its_weight_gives() -> None:
    door = Door(100, 10, weights=lambda: {"large": 4.0})
    for idx in range(6):
        door.enter(f"large{idx}", "large")
    for idx in range(4):
        door.enter(f"small{idx}", "small")
    assert door.enter("modest", "modest")
    assert list(door.refused) == ["small3"], "4 / 1 is more than 6 / 4"
    assert "--max-queued-requests-total" in door.refused["small3"].message
    assert door.reasons == [("small", Reason.SERVER_QUEUE, 1)]
    assert not door.enter("small4", "small")


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_whatever_comes_the_limits_hold_and_the_counts_are_right(data: st.DataObject) -> None:
    door = Door(data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12)))
    inside: dict[str, set[int]] = {}
    begun: set[str] = set()
    for step in range(data.draw(st.integers(1, 60))):
        event = data.draw(st.sampled_from(("enter", "enter", "begin", "leave")))
        if event == "enter":
            num = data.draw(st.integers(1, 3))
            name = f"r{step}"
            tenant = data.draw(st.sampled_from("abc"))
            try:
                if door.enter(name, tenant, flex=data.draw(st.booleans()), num=num):
                    inside[name] = set(range(num))
            except InvalidRequest:
                continue
            for gone in set(inside) & set(door.refused):
                assert gone not in begun
                del inside[gone]
        elif inside:
            name = data.draw(st.sampled_from(sorted(inside)))
            if event == "begin":
                choice = data.draw(st.sampled_from((None, 0, 1, 2)))
                door.control.begin(door.tickets[name], choice)
                begun.add(name)
                inside[name] -= {choice}
            else:
                door.control.leave(door.tickets[name])
                del inside[name]
        counts = dict.fromkeys("abc", 0)
        for name, waiting in inside.items():
            counts[door.tickets[name].tenant] += len(waiting)
        assert counts == {tenant: door.control.num_waiting(tenant) for tenant in "abc"}
        assert max(counts.values()) <= door.control._limits.per_tenant
        assert sum(counts.values()) <= door.control._limits.total


# ---------------------------------------------------------------- with the scheduler, on a simulated clock


class Server:
    """The door, the scheduler behind it, and a clock that iterations move."""

    def __init__(self, seed: int, limits: QueueLimits, num_seqs: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        sizes = Limits(
            num_blocks=256, block_size=4, max_num_seqs=num_seqs, max_batch_tokens=128, max_model_len=64,
            num_adapter_slots=0, arena_elements=0, window_tokens=8, num_layers=2, max_train_tokens=0,
        )  # fmt: skip
        self.scheduler = Scheduler(sizes, CostModel(), LatencyTargets(0.05, 2.0))
        self.door = Admission(limits, drain_s=self.drain_s)
        self.tickets: dict[str, Ticket] = {}
        self.arrived: list[str] = []
        self.first_s: dict[str, float] = {}
        self.refused: Counter[str] = Counter()
        self.waits: list[float] = []

    def drain_s(self, tenant: str, num_waiting: int) -> float | None:
        queue = self.scheduler.queues(self.now).get(tenant)
        return None if queue is None else queue.drain_s * num_waiting / queue.num_waiting

    def arrive(self, name: str, tenant: str) -> None:
        def refuse(error: Overloaded) -> None:
            self.scheduler.abort(name)
            self.note(tenant, error)

        try:
            self.tickets[name] = self.door.enter(tenant, "default", {0}, refuse)
        except Overloaded as error:
            self.note(tenant, error)
            return
        self.arrived.append(name)
        self.scheduler.add_request(RequestSpec(name, tenant, 16, self.random.randint(1, 12)), self.now)

    def note(self, tenant: str, error: Overloaded) -> None:
        self.refused[tenant] += 1
        assert error.retry_after_s is not None
        self.waits.append(error.retry_after_s)

    def step(self) -> None:
        plan = self.scheduler.plan(self.now)
        self.now += plan.predicted_s or 0.01
        sampled = {segment.sequence_id: 1 for segment in plan.forward if segment.samples}
        for outcome in self.scheduler.commit(plan, StepResult(sampled, plan.predicted_s), self.now):
            assert isinstance(outcome, SequenceToken)
            name = outcome.sequence_id
            if name not in self.first_s:
                self.first_s[name] = self.now
                self.door.begin(self.tickets[name], 0)
            if outcome.finish_reason is not None:
                self.door.leave(self.tickets[name])


@given(seed=st.integers(0, 2**32), num_seqs=st.sampled_from((1, 4, 8)), burst=st.integers(20, 200))
@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_a_flooding_tenant_is_shed_and_a_modest_one_is_not(seed: int, num_seqs: int, burst: int) -> None:
    server = Server(seed, QueueLimits(per_tenant=40, total=50), num_seqs)
    modest = deque(f"modest{idx}" for idx in range(12))
    for step in range(300):
        for idx in range(burst if step % 10 == 0 else 2):
            server.arrive(f"flood{step}-{idx}", "flood")
            server.arrive(f"other{step}-{idx}", "other")
        if step % 25 == 0 and modest:
            server.arrive(modest.popleft(), "modest")
        server.step()
        server.scheduler.check_invariants()
    while any(name not in server.first_s for name in server.arrived if name.startswith("modest")):
        server.step()
    assert server.refused["flood"] > 100
    assert server.refused["other"] > 100
    assert server.refused["modest"] == 0
    assert sum(name.startswith("modest") for name in server.first_s) == 12
    assert all(1.0 <= wait_s <= 120.0 for wait_s in server.waits)
