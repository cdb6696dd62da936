"""What a committed iteration did: the result that the engine reports, and the outcomes that follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias


@dataclass(frozen=True, slots=True)
class StepResult:
    """One executed plan: the token sampled for every segment with `samples`, and the seconds it took."""

    sampled: dict[str, int] = field(default_factory=dict)
    elapsed_s: float = 0.0


class SequenceToken(NamedTuple):
    """A sequence has got a token; with a `finish_reason` it was the last one.

    `num_cached_tokens` of its prompt were in the prefix cache when it was first admitted.
    """

    sequence_id: str
    token_id: int
    finish_reason: Literal["stop", "length"] | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PackForwarded:
    """Every window of a pack has been forwarded with its loss (once per pack; forwarding again is not
    reported).
    """

    pack_id: str


@dataclass(frozen=True, slots=True)
class PackDone:
    """The last slice (layer 0, window 0) of a pack has run."""

    pack_id: str


@dataclass(frozen=True, slots=True)
class StepDone:
    """The optimizer step of a job has run; packs of its next step may be added."""

    job_id: str


Outcome: TypeAlias = SequenceToken | PackForwarded | PackDone | StepDone
