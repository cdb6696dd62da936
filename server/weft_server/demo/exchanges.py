"""The base model's own tasks by name, and how often each occurs in the corpus.

Every task in `SCORED_TASKS` has exactly one right answer per prompt and is measured by exact match.
Knows nothing of chat markup, tokens, splits or the demo's finetuning tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from weft_server.demo import knowledge, lists, prose, structured

ExchangeMaker = Callable[[Random], tuple[str, str]]
"""Draws a prompt and its answer."""

SCORED_TASKS: dict[str, ExchangeMaker] = {
    "capital": knowledge.capital,
    "opposite": knowledge.opposite,
    "sound": knowledge.sound,
    "calendar": knowledge.calendar,
    "arithmetic": knowledge.arithmetic,
    "compare": knowledge.compare,
    "number_word": knowledge.number_word,
    "repeat": lists.repeat,
    "reverse": lists.reverse,
    "pick": lists.pick,
    "category": knowledge.category,
    "membership": knowledge.membership,
    "reading": prose.reading,
    "json_format": structured.json_format,
    "json_extract": structured.json_extract,
    "label": structured.label,
    "small_talk": knowledge.small_talk,
    "remark": prose.remark,
}
"""Tasks with one right answer per prompt."""

TASKS: dict[str, ExchangeMaker] = {**SCORED_TASKS, "story": prose.story}
"""All tasks, by name."""

TASK_WEIGHTS: dict[str, int] = {
    "capital": 5,
    "opposite": 3,
    "sound": 1,
    "calendar": 3,
    "arithmetic": 7,
    "compare": 5,
    "number_word": 2,
    "repeat": 9,
    "reverse": 9,
    "pick": 8,
    "category": 6,
    "membership": 4,
    "reading": 10,
    "json_format": 12,
    "json_extract": 12,
    "label": 8,
    "small_talk": 2,
    "remark": 4,
    "story": 3,
}
"""How often each task occurs in the corpus, in parts of their sum."""
