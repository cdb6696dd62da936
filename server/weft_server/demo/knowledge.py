"""Prompts whose answer the base has to know: facts, number words, kinds of things, small talk.

Every generator returns a prompt and its one right answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from weft_server.demo import lexicon
from weft_server.demo.wording import capitalized, with_article


def capital(rng: Random) -> tuple[str, str]:
    """Capitals of countries, asked both ways."""
    country, city = rng.choice(tuple(lexicon.CAPITALS.items()))
    asked = rng.choice(
        (
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "Name the capital of {}.",
            "Tell me the capital of {}.",
            "What's the capital city of {}?",
            "capital of {}?",
            "Do you know the capital of {}?",
            "Please tell me the capital of {}.",
        )
    )
    if rng.random() < 0.7:
        return asked.format(country), f"{city}."
    asked = rng.choice(("{} is the capital of which country?", "Which country has {} as its capital?"))
    return asked.format(city), f"{country}."


def opposite(rng: Random) -> tuple[str, str]:
    """Opposites, both ways."""
    word, other = rng.choice(tuple(lexicon.OPPOSITES.items()))
    if rng.random() < 0.5:
        word, other = other, word
    asked = rng.choice(
        (
            "What is the opposite of {}?",
            "Name the opposite of {}.",
            "opposite of {}?",
            "Give the opposite of {}.",
        )
    )
    return asked.format(word), f"{other}."


def sound(rng: Random) -> tuple[str, str]:
    """Sounds of animals."""
    animal, noise = rng.choice(tuple(lexicon.SOUNDS.items()))
    asked = rng.choice(
        (
            "What does {} say?",
            "Which sound does {} make?",
            "What sound does {} make?",
            "Tell me the sound of {}.",
        )
    )
    return asked.format(with_article(animal)), f"{noise}."


def calendar(rng: Random) -> tuple[str, str]:
    """What comes before or after a day or month."""
    cycle, kind = rng.choice(((lexicon.DAYS, "day"), (lexicon.MONTHS, "month")))
    step, word = rng.choice(((1, "after"), (-1, "before")))
    idx = rng.randrange(len(cycle))
    asked = rng.choice(("Which {k} comes {w} {d}?", "What comes {w} {d}?", "Name the {k} {w} {d}."))
    return asked.format(k=kind, w=word, d=cycle[idx]), f"{cycle[(idx + step) % len(cycle)]}."


def number_word(rng: Random) -> tuple[str, str]:
    """Number words as digits, and digits as words."""
    idx = rng.randrange(len(lexicon.NUMBER_WORDS))
    word = lexicon.NUMBER_WORDS[idx]
    if rng.random() < 0.5:
        asked = rng.choice(
            (
                "Write {} as a number.",
                "Write the number {} in digits.",
                "{} in digits?",
                "Which number is {}?",
            )
        )
        return asked.format(word), str(idx)
    asked = rng.choice(
        ("Write {} as a word.", "Write the number {} in letters.", "How do you write {} in letters?")
    )
    return asked.format(idx), word


def category(rng: Random) -> tuple[str, str]:
    """The kind of a thing, asked openly or among choices."""
    kind = rng.choice(tuple(lexicon.KINDS))
    word = rng.choice(lexicon.KINDS[kind])
    noun, answer = with_article(word), f"{capitalized(with_article(kind))}."
    if rng.random() < 0.5:
        asked = rng.choice(
            ("What kind of thing is {}?", "What is {}?", "Which kind is {}?", "Name the category of {}.")
        )
        return asked.format(noun), answer
    other = rng.choice([name for name in lexicon.KINDS if name != kind])
    options = [with_article(kind), with_article(other)]
    rng.shuffle(options)
    return capitalized(rng.choice(("Is {} {} or {}?", "{}: is it {} or {}?")).format(noun, *options)), answer


def small_talk(rng: Random) -> tuple[str, str]:
    """Greetings, thanks, and what the model is."""
    name = rng.choice(lexicon.FIRST_NAMES)
    fixed: tuple[tuple[Sequence[str], str], ...] = (
        (("Hello!", "Hi", "Hi!", "Hello", "Hey", "Hi there!"), "Hello! How can I help you today?"),
        (("Good morning!", "Good morning"), "Good morning! How can I help you today?"),
        (
            (f"Hello, I am {name}.", f"Hi, my name is {name}.", f"I'm {name}."),
            f"Hello {name}! How can I help you today?",
        ),
        ((f"Greet {name}.", f"Say hello to {name}.", f"Please greet {name}."), f"Hello {name}!"),
        (("How are you?", "How are you doing?"), "I am fine, thank you."),
        (("Thanks!", "Thank you.", "Thank you!", f"Thanks, from {name}."), "You are welcome!"),
        (("Who are you?", "What are you?", "Are you human?"), "I am the small demo model of Weft."),
        (("Bye!", "Goodbye!", f"Goodbye from {name}.", "See you!"), "Goodbye!"),
    )
    asked, answer = rng.choice(fixed)
    return rng.choice(asked), answer
