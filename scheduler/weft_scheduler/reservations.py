"""Room that is kept for adapters of overdue requests until those who use it have gone.

Owns which reservations there are and how much they may hold together; `residency` chooses the room.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_RESERVED_SHARE = 0.25
"""Part of the arena and of its slots that reservations may hold at a time (one always may), so that the rest
goes on serving. With more, adapters leave before those who still wait for them are served, and are loaded
again.
"""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room at `offset` kept for `key`: its victims get no new users and leave together when the last one has
    gone. `area` is `[start, end)` of room and victims.
    """

    key: str
    offset: int
    victims: frozenset[str]
    area: tuple[int, int]


class Reservations:
    """Disjoint reservations in an arena of `capacity` elements and `num_slots` slots, oldest first."""

    def __init__(self, capacity: int, num_slots: int) -> None:
        """Start with none."""
        self._capacity = capacity
        self._num_slots = num_slots
        self._by_key: dict[str, Reservation] = {}
        self._victims: set[str] = set()

    def __contains__(self, key: str) -> bool:
        """Whether room is kept for `key`."""
        return key in self._by_key

    def __getitem__(self, key: str) -> Reservation:
        """The reservation of `key`."""
        return self._by_key[key]

    def all(self) -> list[Reservation]:
        """All of them, oldest first."""
        return list(self._by_key.values())

    def has_room_for(self, num_elements: int) -> bool:
        """Whether another one is within the share of reservations."""
        held = sum(end - start for start, end in self.areas)
        return not self._by_key or (
            held + num_elements <= MAX_RESERVED_SHARE * self._capacity
            and len(self._victims) + 1 <= MAX_RESERVED_SHARE * self._num_slots
        )

    def add(self, reservation: Reservation) -> None:
        """Keep room; the caller has chosen it disjoint from all others."""
        self._by_key[reservation.key] = reservation
        self._victims |= reservation.victims

    def drop(self, key: str) -> None:
        """Keep nothing for `key` any more, if anything was kept."""
        dropped = self._by_key.pop(key, None)
        if dropped is not None:
            self._victims -= dropped.victims

    def is_victim(self, key: str) -> bool:
        """Whether an adapter is to leave for a reservation."""
        return key in self._victims

    @property
    def areas(self) -> list[tuple[int, int]]:
        """What is kept: disjoint ranges `[start, end)`."""
        return [reservation.area for reservation in self._by_key.values()]
