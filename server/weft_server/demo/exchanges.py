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
    "number_word": knowledge.number_word,
    "category": knowledge.category,
    "repeat": lists.repeat,
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
    "capital": 7,
    "opposite": 5,
    "sound": 2,
    "calendar": 5,
    "number_word": 3,
    "category": 7,
    "repeat": 14,
    "json_format": 16,
    "json_extract": 18,
    "label": 8,
    "small_talk": 3,
    "remark": 4,
    "story": 3,
}
"""How often each task occurs in the corpus, in parts of their sum."""
