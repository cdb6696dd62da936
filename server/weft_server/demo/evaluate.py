"""Exact-match scoring of answers, and what it takes to ask for them.

Owns the comparison and the report per task. Knows nothing of models: whoever answers is a callable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weft_server.demo.corpus import Exchange

Answerer = Callable[[Sequence[str]], Sequence[str]]
"""Maps user prompts to the assistant's greedy answers, special tokens removed, in the same order."""


@dataclass(frozen=True, slots=True)
class Score:
    """How many of `num_asked` prompts were answered exactly."""

    num_asked: int
    num_right: int

    @property
    def accuracy(self) -> float:
        """Share of prompts answered exactly, 0 where none was asked."""
        return self.num_right / self.num_asked if self.num_asked else 0.0


def score_by_task(exchanges: Sequence[Exchange], answer: Answerer) -> dict[str, Score]:
    """Ask every exchange's prompt and count exact matches (outer white space ignored) per task.

    Raises:
        ValueError: `answer` returned another number of answers than it was given prompts.
    """
    answers = answer([exchange.prompt for exchange in exchanges])
    scores: dict[str, Score] = {}
    for exchange, given in zip(exchanges, answers, strict=True):
        before = scores.get(exchange.task, Score(0, 0))
        is_right = given.strip() == exchange.answer
        scores[exchange.task] = Score(before.num_asked + 1, before.num_right + is_right)
    return scores


def total(scores: dict[str, Score]) -> Score:
    """Return the sum of all tasks' scores."""
    return Score(sum(s.num_asked for s in scores.values()), sum(s.num_right for s in scores.values()))
