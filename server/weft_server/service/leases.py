"""Who runs a job: a lease with a fencing epoch, as a pure value.

Several servers may share one store. A job's record carries a lease; its owner renews it, and when it lapses
another server takes the job over with a higher epoch. Every message about a job carries the epoch that it
was started under, so whatever an earlier owner (or an earlier engine) still sends is told apart and
dropped. Times are the store's clock, the only one that the servers share. Owns no storage: callers write a
lease with a compare-and-set of the record it lies in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

DEFAULT_LEASE_S = 20.0


@dataclass(frozen=True, slots=True)
class Lease:
    """Server `owner` runs the job as epoch `epoch` until `until` (seconds of the store's clock)."""

    owner: str
    epoch: int
    until: float

    def to_value(self) -> dict[str, Any]:
        """As stored in a record."""
        return {"owner": self.owner, "epoch": self.epoch, "until": self.until}

    @classmethod
    def from_value(cls, value: dict[str, Any] | None) -> Lease | None:
        """From a record; None where nobody has ever held it."""
        if value is None:
            return None
        return cls(owner=str(value["owner"]), epoch=int(value["epoch"]), until=float(value["until"]))

    def held_by(self, owner: str) -> bool:
        """Whether this is `owner`'s lease. A lapsed lease that nobody took is still its owner's to renew."""
        return self.owner == owner


def try_acquire(
    current: Lease | None, owner: str, *, now: float, duration_s: float, exclusive: bool = False
) -> Lease | None:
    """The lease that `owner` may write over `current`, with a higher epoch; None while another holds it.

    Args:
        current: the lease in the record, None if there never was one.
        owner: the server that wants it.
        now: the store's clock, seconds.
        duration_s: how long it is good for without renewal.
        exclusive: no other server can be alive on this store (its data directory is locked), so another
            owner's
            lease is a dead process's and need not lapse first.
    """
    if current is None:
        return Lease(owner, epoch=1, until=now + duration_s)
    if current.owner == owner or exclusive or current.until <= now:
        return Lease(owner, epoch=current.epoch + 1, until=now + duration_s)
    return None


def renewed(lease: Lease, *, now: float, duration_s: float) -> Lease:
    """The same lease, good for `duration_s` from now; the epoch stays."""
    return replace(lease, until=now + duration_s)


def needs_renewal(lease: Lease, *, now: float, duration_s: float) -> bool:
    """Whether a third of the lease's time has passed."""
    return lease.until - now < duration_s * 2 / 3


def released(lease: Lease) -> Lease:
    """The same lease, lapsed: another server may take the job over at once."""
    return replace(lease, until=0.0)
