"""The training text of the bundled base: seeded, generated here, split into training and held-out prompts.

Owns how exchanges become documents (chat markup, system prompts, several turns, plain stories) and which
prompts are held out: a prompt is held out by its own hash, so no seed and no length of training can leak one.
Knows nothing of tokens or models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from weft_server.demo import lexicon
from weft_server.demo.exchanges import SCORED_TASKS, TASK_WEIGHTS, TASKS
from weft_server.demo.lists import drill
from weft_server.demo.prose import story_about

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
TEXT_END = "<|endoftext|>"
PADDING = "<|pad|>"
SPECIAL_TOKENS = (TURN_END, TURN_START, TEXT_END, PADDING)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are the small demo model of Weft.",
    "Answer briefly.",
    "You are a friendly assistant in a shop.",
)

HELD_OUT_ONE_IN = 20
NUM_DRILLED_DOCUMENTS = 20_000


@dataclass(frozen=True, slots=True)
class Exchange:
    """One prompt of a named task and the answer that the base should give."""

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a document; `is_target` marks what the model should learn to write: answers, plain text."""

    text: str
    is_target: bool


Document = tuple[Span, ...]


def is_held_out(prompt: str) -> bool:
    """Say whether `prompt` is kept out of training: one in `HELD_OUT_ONE_IN`, by SHA-256 of its text."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:4]) % HELD_OUT_ONE_IN == 0


def draw_exchange(rng: Random, task: str, *, held_out: bool) -> Exchange:
    """Draw exchanges of `task` until one falls on the wanted side of the split."""
    while True:
        prompt, answer = TASKS[task](rng)
        if is_held_out(prompt) == held_out:
            return Exchange(task, prompt, answer)


def turn(role: str, content: str) -> str:
    """Return one chat turn in ChatML, exactly as `CHAT_TEMPLATE` renders it."""
    return f"{TURN_START}{role}\n{content}{TURN_END}\n"


def chat_document(exchanges: list[Exchange], system: str | None) -> Document:
    """Return the chat of `exchanges`; the answers with their end token are targets."""
    spans = [Span(turn("system", system), is_target=False)] if system is not None else []
    for exchange in exchanges:
        spans.append(Span(f"{turn('user', exchange.prompt)}{TURN_START}assistant\n", is_target=False))
        spans.append(Span(f"{exchange.answer}{TURN_END}", is_target=True))
        spans.append(Span("\n", is_target=False))
    return tuple(spans)


def drill_share(num_drawn: int) -> float:
    """Return how often document number `num_drawn` is a copying drill: 60 % at first, soon only 3 %."""
    return max(0.03, 0.6 * (1.0 - num_drawn / NUM_DRILLED_DOCUMENTS))


def training_documents(seed: int) -> Iterator[Document]:
    """Yield training documents without end; equal seeds yield equal documents."""
    rng = Random(seed)
    tasks, weights = tuple(TASK_WEIGHTS), tuple(TASK_WEIGHTS.values())
    num_drawn = 0
    while True:
        num_drawn += 1
        if rng.random() < drill_share(num_drawn):
            given, again = drill(rng)
            yield (Span(given, is_target=False), Span(again + TEXT_END, is_target=True))
            continue
        if rng.random() < 0.01:
            name, animal = rng.choice(lexicon.FIRST_NAMES), rng.choice(lexicon.KINDS["animal"])
            yield (Span(story_about(rng, name, animal) + TEXT_END, is_target=True),)
            continue
        num_turns = rng.choices((1, 2, 3), (80, 13, 7))[0]
        exchanges = [
            draw_exchange(rng, task, held_out=False) for task in rng.choices(tasks, weights, k=num_turns)
        ]
        yield chat_document(exchanges, rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else None)


def held_out_exchanges(seed: int, num_per_task: int) -> list[Exchange]:
    """Return `num_per_task` different held-out exchanges of every scored task (fewer where a task has fewer).

    A task whose prompts are few (small talk) gives as many as a fixed number of draws finds.
    """
    rng = Random(seed)
    found: list[Exchange] = []
    for task, make in SCORED_TASKS.items():
        of_task: dict[str, Exchange] = {}
        for _ in range(num_per_task * HELD_OUT_ONE_IN * 20):
            if len(of_task) == num_per_task:
                break
            prompt, answer = make(rng)
            if is_held_out(prompt):
                of_task[prompt] = Exchange(task, prompt, answer)
        found += of_task.values()
    return found


def document_text(document: Document) -> str:
    """Return the document as one string with its special tokens spelled out."""
    return "".join(span.text for span in document)


def without_special_tokens(text: str) -> str:
    """Return `text` with every special token replaced by a line break, for the training of the tokenizer."""
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "\n")
    return text
