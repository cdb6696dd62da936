"""Lists of words: prompts to copy one, and plain drills of the same."""

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
