"""Exact-match scoring."""

from __future__ import annotations

import pytest

from weft_server.demo.corpus import Exchange
from weft_server.demo.evaluate import Score, score_by_task, total

EXCHANGES = [Exchange("a", "1", "one"), Exchange("a", "2", "two"), Exchange("b", "3", "three")]


def test_only_exact_answers_count():
    scores = score_by_task(EXCHANGES, lambda _: [" one\n", "Two", "three"])
    assert scores == {"a": Score(2, 1), "b": Score(1, 1)}
    assert total(scores) == Score(3, 2)
    assert total(scores).accuracy == pytest.approx(2 / 3)


def test_a_missing_answer_is_an_error():
    with pytest.raises(ValueError, match="shorter"):
        score_by_task(EXCHANGES, lambda _: ["one", "two"])


def test_nothing_asked_is_nothing_right():
    assert total({}).accuracy == 0.0
