"""Leases: one owner at a time, and an epoch that only grows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from weft_server.service.leases import Lease, needs_renewal, released, renewed, try_acquire


def test_a_lease_that_is_held_cannot_be_taken_until_it_lapses() -> None:
    held = try_acquire(None, "a", now=100.0, duration_s=20.0)
    assert held == Lease("a", 1, 120.0)
    assert try_acquire(held, "b", now=119.9, duration_s=20.0) is None
    assert try_acquire(held, "b", now=120.0, duration_s=20.0) == Lease("b", 2, 140.0)


def test_on_a_store_of_its_own_a_server_need_not_wait_for_a_dead_process() -> None:
    assert try_acquire(Lease("a", 4, 120.0), "b", now=100.0, duration_s=20.0, exclusive=True) == Lease(
        "b", 5, 120.0
    )


def test_renewing_keeps_the_epoch_and_releasing_lets_another_in_at_once() -> None:
    lease = Lease("a", 3, 120.0)
    assert renewed(lease, now=110.0, duration_s=20.0) == Lease("a", 3, 130.0)
    assert try_acquire(released(lease), "b", now=100.0, duration_s=20.0) == Lease("b", 4, 120.0)
    assert not needs_renewal(lease, now=106.0, duration_s=20.0)
    assert needs_renewal(lease, now=107.0, duration_s=20.0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 50), st.booleans())))
def test_the_epoch_grows_with_every_new_owner(steps: list[tuple[str, float, bool]]) -> None:
    lease: Lease | None = None
    now = 0.0
    for owner, waited, exclusive in steps:
        now += waited
        taken = try_acquire(lease, owner, now=now, duration_s=20.0, exclusive=exclusive)
        if taken is None:
            assert lease is not None
            assert lease.until > now
            continue
        assert taken.epoch == (1 if lease is None else lease.epoch + 1)
        assert Lease.from_value(taken.to_value()) == taken
        lease = taken
