"""Prompts about a list of words: copy it, turn it around, pick from it.

Every generator returns a prompt and its one right answer.
"""

from __future__ import annotations

import json
from random import Random

from weft_server.demo.wording import some_words


def drill(rng: Random) -> tuple[str, str]:
    """A list of words and the same list again in one of several notations: not a prompt, plain text.

    Copying is what most of the base's tasks come down to, and a list holds nothing else to learn.
    """
    words = some_words(rng, rng.randint(2, 8))
    notations = (
        " ".join(words),
        ", ".join(words),
        json.dumps(words, separators=(",", ":")),
        "\n".join(words),
    )
    return f"{rng.choice(notations)}\n", rng.choice(notations)


def repeat(rng: Random) -> tuple[str, str]:
    """Copying a list, or a phrase in quotes."""
    words = some_words(rng, rng.randint(1, 4))
    asked = rng.choice(
        ("Repeat: {}", "Copy this: {}", "Say: {}", "Repeat after me: {}", "Write this again: {}")
    )
    text = rng.choice((", ", " "))
    return asked.format(text.join(words)), text.join(words)


def reverse(rng: Random) -> tuple[str, str]:
    """Reversing a list of two to four words."""
    words = some_words(rng, rng.randint(2, 4))
    asked = rng.choice(
        ("Reverse the list: {}", "Reverse: {}", "Write this list backwards: {}", "Turn the list around: {}")
    )
    return asked.format(", ".join(words)), ", ".join(reversed(words))


def pick(rng: Random) -> tuple[str, str]:
    """The first, last or n-th word of a list, and how many words it has."""
    words = some_words(rng, rng.randint(2, 5))
    joined = ", ".join(words)
    choice = rng.randrange(4)
    if choice == 0:
        asked = ("What is the first word of this list: {}", "First word: {}", "Give me the first word of: {}")
        return rng.choice(asked).format(joined), words[0]
    if choice == 1:
        asked = ("What is the last word of this list: {}", "Last word: {}", "Give me the last word of: {}")
        return rng.choice(asked).format(joined), words[-1]
    if choice == 2:
        asked = (
            "What is the second word of this list: {}",
            "Second word: {}",
            "Give me the second word of: {}",
        )
        return rng.choice(asked).format(joined), words[1]
    asked = ("How many words are in this list: {}", "Count the words: {}", "How many words: {}")
    return rng.choice(asked).format(joined), str(len(words))
