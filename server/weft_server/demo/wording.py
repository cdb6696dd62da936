"""Small pieces that the prompt generators share: articles, capitals, made-up words, draws of words.

Knows nothing of tasks.
"""

from __future__ import annotations

from random import Random

from weft_server.demo import lexicon

ARTICLE_VOWELS = "aeiou"


WORD_POOL: tuple[str, ...] = tuple(
    sorted(
        {word for words in lexicon.KINDS.values() for word in words}
        | set(lexicon.THINGS)
        | set(lexicon.GOODS)
    )
)


def with_article(noun: str) -> str:
    """Return `noun` behind `a` or `an`."""
    return f"an {noun}" if noun[0] in ARTICLE_VOWELS else f"a {noun}"


def capitalized(sentence: str) -> str:
    """Return `sentence` with its first letter in upper case and the rest untouched."""
    return sentence[0].upper() + sentence[1:]


def some_words(rng: Random, num_words: int) -> list[str]:
    """Return `num_words` different words: mostly of the lexicon, sometimes names, cities or made-up ones."""
    draw = rng.random()
    if draw < 0.5:
        return rng.sample(WORD_POOL, num_words)
    if draw < 0.75:
        return rng.sample(lexicon.FIRST_NAMES, num_words)
    return rng.sample(lexicon.CITIES, num_words)
