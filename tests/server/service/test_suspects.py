"""Finding out who kills the engine, on a simulated one: whatever the order, innocents never fail."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft_server.service.suspects import PATIENCE_S, SMALL, Suspects

MARGIN = 3


@dataclass
class Item:
    """Something that runs for `length` iterations. Poison kills its engine in the iteration `dies_at`."""

    arrives: int
    length: int
    dies_at: int | None = None
    position: int = 0
    failed: bool = False

    @property
    def is_done(self) -> bool:
        return self.failed or self.position >= self.length


@dataclass
class Server:
    """An engine that runs up to `batch` items an iteration, those it was given first in front."""

    items: dict[str, Item]
    batch: int = 1000
    suspects: Suspects = field(default_factory=Suspects)
    in_engine: list[str] = field(default_factory=list)
    num_deaths: int = 0
    now: int = 0

    def run(self) -> None:
        while not all(item.is_done for item in self.items.values()):
            assert self.now < 20_000, "somebody waits for ever"
            self._give(name for name, item in self.items.items() if item.arrives == self.now)
            self._give(self.suspects.admit(self.now))
            self._iterate()
            self.now += 1

    def _give(self, names: object) -> None:
        for name in names:  # type: ignore[attr-defined]
            if not self.suspects.must_wait(name) and name not in self.in_engine:
                self.in_engine.append(name)

    def _iterate(self) -> None:
        plan = self.in_engine[: self.batch]
        if any(self.items[name].position == self.items[name].dies_at for name in plan):
            self._die(plan)
            return
        for name in plan:
            item = self.items[name]
            item.position += 1
            self.suspects.progressed(name, item.position, self.now)
            if item.is_done:
                self.suspects.forget(name)
                self.in_engine.remove(name)

    def _die(self, plan: list[str]) -> None:
        self.num_deaths += 1
        guilty = self.suspects.engine_died({name: self.items[name].position + MARGIN for name in plan})
        if guilty is not None:
            self.items[guilty].failed = True
        self.in_engine = []
        arrived = [name for name, item in self.items.items() if item.arrives <= self.now]
        self._give(name for name in arrived if not self.items[name].is_done)


def innocents(max_size: int) -> st.SearchStrategy[list[Item]]:
    item = st.builds(Item, arrives=st.integers(0, 30), length=st.integers(1, 40))
    return st.lists(item, min_size=1, max_size=max_size)


def poisons(max_size: int) -> st.SearchStrategy[list[Item]]:
    item = st.builds(Item, arrives=st.integers(0, 30), length=st.just(1000), dies_at=st.integers(0, 40))
    return st.lists(item, min_size=1, max_size=max_size)


def simulate(good: list[Item], bad: list[Item], order: int, batch: int = 1000) -> Server:
    named = [(f"good-{idx}", item) for idx, item in enumerate(good)]
    named += [(f"bad-{idx}", item) for idx, item in enumerate(bad)]
    turn = order % len(named)
    server = Server(dict(named[turn:] + named[:turn]), batch)
    server.run()
    return server


@given(innocents(60), poisons(1), st.integers(0, 100))
@settings(max_examples=300)
def test_one_poison_fails_within_three_deaths_and_no_innocent_fails(
    good: list[Item], bad: list[Item], order: int
) -> None:
    server = simulate(good, bad, order)
    assert [name for name, item in server.items.items() if item.failed] == ["bad-0"]
    assert server.num_deaths <= 3


@given(innocents(SMALL - 1), poisons(1), st.integers(0, 100))
@settings(max_examples=300)
def test_among_few_the_poison_fails_at_its_second_death(
    good: list[Item], bad: list[Item], order: int
) -> None:
    assert simulate(good, bad, order).num_deaths == 2


@given(innocents(60), poisons(1), st.integers(0, 100), st.integers(1, 4))
def test_suspects_that_the_engine_has_no_room_for_are_cleared_all_the_same(
    good: list[Item], bad: list[Item], order: int, batch: int
) -> None:
    server = simulate(good, bad, order, batch)
    assert [name for name, item in server.items.items() if item.failed] == ["bad-0"]
    assert server.num_deaths <= 3


@given(innocents(20), poisons(4), st.integers(0, 100))
@settings(max_examples=300)
def test_several_poisons_all_fail(good: list[Item], bad: list[Item], order: int) -> None:
    server = simulate(good, bad, order)
    failed = {name for name, item in server.items.items() if item.failed}
    assert {f"bad-{idx}" for idx in range(len(bad))} <= failed


def test_poisons_in_one_plan_cost_one_death_each_and_one_more() -> None:
    bad = [Item(0, 1000, 5) for _ in range(3)]
    assert simulate([Item(0, 40) for _ in range(5)], bad, 0).num_deaths == 4


def test_who_was_not_in_the_plan_need_not_wait() -> None:
    suspects = Suspects()
    assert suspects.engine_died({"a": 1, "b": 1}) is None
    assert ("c" in suspects, suspects.must_wait("c")) == (False, False)
    assert suspects.must_wait("a")
    assert suspects.must_wait("b")
    assert suspects.admit(0.0) == ["a"]
    assert not suspects.must_wait("a")


def test_a_death_before_anything_was_planned_is_nobodys_fault() -> None:
    suspects = Suspects()
    suspects.engine_died({"a": 1, "b": 1})
    suspects.admit(0.0)
    assert suspects.engine_died({}) is None
    assert suspects.admit(1.0) == ["a"]


def test_a_suspect_is_cleared_only_beyond_the_point_of_its_death() -> None:
    suspects = Suspects()
    suspects.engine_died({"job": 8, "other": 1})
    suspects.admit(0.0)
    for step in range(1, 8):
        suspects.progressed("job", step, 100.0 * step)
        assert suspects.admit(100.0 * step + 1) == []
    assert suspects.engine_died({"job": 8}) == "job"


def test_forgiven_deaths_do_not_count() -> None:
    suspects = Suspects()
    for death in range(10):
        assert suspects.engine_died({"a": death + 1}) is None
        assert suspects.admit(float(death)) == ["a"]
        suspects.progressed("a", death + 1, float(death))
        assert "a" not in suspects


@pytest.mark.parametrize("is_on_trial", [False, True])
def test_nobody_waits_for_a_suspect_that_ended(is_on_trial: bool) -> None:
    suspects = Suspects()
    suspects.engine_died({"a": 1, "b": 1})
    if is_on_trial:
        assert suspects.admit(0.0) == ["a"]
    suspects.forget("a")
    assert suspects.admit(0.1) == ["b"]


def test_a_trial_without_any_sign_of_life_does_not_hold_up_the_next() -> None:
    suspects = Suspects()
    suspects.engine_died({"starved": 1, "poison": 1, "other": 1})
    assert suspects.admit(0.0) == ["starved"]
    assert suspects.admit(PATIENCE_S - 1) == []
    assert suspects.admit(PATIENCE_S) == ["poison"]
    assert suspects.engine_died({"starved": 1, "poison": 1}) is None
    assert suspects.admit(PATIENCE_S + 1) == ["starved"], "each alone, before those who wait longer"
