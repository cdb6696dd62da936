"""Prompts whose answer has a fixed form: compact JSON, or `label: ...`.

The demo's finetuning tasks use these output formats; their prompts and labels are not here.
Every generator returns a prompt and its one right answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from weft_server.demo import lexicon


def compact_json(fields: dict[str, object]) -> str:
    """Return `fields` as JSON without spaces, in insertion order, the form the base is trained to write."""
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False)


FIELD_VALUES: dict[str, Callable[[Random], object]] = {
    "name": lambda rng: rng.choice(lexicon.FIRST_NAMES),
    "city": lambda rng: rng.choice(lexicon.CITIES),
    "age": lambda rng: rng.randint(1, 99),
    "day": lambda rng: rng.choice(lexicon.DAYS),
    "month": lambda rng: rng.choice(lexicon.MONTHS),
    "colour": lambda rng: rng.choice(lexicon.COLOURS),
    "job": lambda rng: rng.choice(lexicon.PROFESSIONS),
    "animal": lambda rng: rng.choice(lexicon.KINDS["animal"]),
    "food": lambda rng: rng.choice(lexicon.KINDS["food"]),
    "thing": lambda rng: rng.choice(lexicon.THINGS),
    "item": lambda rng: rng.choice(lexicon.GOODS),
    "qty": lambda rng: rng.randint(1, 40),
    "price": lambda rng: rng.randint(1, 200),
    "from": lambda rng: rng.choice(lexicon.CITIES),
    "to": lambda rng: rng.choice(lexicon.CITIES),
}


def json_format(rng: Random) -> tuple[str, str]:
    """Fields given as `key = value`, wanted as compact JSON."""
    keys = rng.sample(tuple(FIELD_VALUES), rng.randint(1, 3))
    fields = {key: FIELD_VALUES[key](rng) for key in keys}
    separator, equals = rng.choice(((", ", " = "), (", ", "="), ("; ", ": "), (", ", " is "), ("\n", ": ")))
    listed = separator.join(f"{key}{equals}{value}" for key, value in fields.items())
    asked = rng.choice(
        ("Write as JSON: {}", "JSON: {}", "Turn this into JSON: {}", "Format as JSON: {}", "To JSON: {}")
    )
    return asked.format(listed), compact_json(fields)


JSON_SENTENCES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("name", "city"),
        (
            "My name is {name} and I live in {city}.",
            "{name} lives in {city}.",
            "In {city} there is somebody called {name}.",
            "{name} comes from {city}.",
        ),
    ),
    (
        ("name", "age"),
        ("{name} is {age} years old.", "I am {name}, {age} years old.", "Last week {name} turned {age}."),
    ),
    (
        ("name", "job", "city"),
        (
            "{name} works as a {job} in {city}.",
            "In {city}, {name} is a {job}.",
            "The {job} of {city} is {name}.",
        ),
    ),
    (
        ("from", "to", "day"),
        (
            "The train goes from {from} to {to} on {day}.",
            "On {day} we travel from {from} to {to}.",
            "I fly to {to} from {from} this {day}.",
        ),
    ),
    (
        ("thing", "colour"),
        ("The {thing} is {colour}.", "I saw a {colour} {thing}.", "We painted the {thing} {colour}."),
    ),
    (
        ("item", "price"),
        (
            "The {item} cost {price} euros.",
            "I paid {price} euros for the {item}.",
            "For {price} euros you get the {item}.",
        ),
    ),
    (
        ("name", "item", "month"),
        (
            "In {month}, {name} found the {item}.",
            "{name} lost the {item} in {month}.",
            "The {item} of {name} broke in {month}.",
        ),
    ),
    (
        ("animal", "food"),
        (
            "The {animal} eats {food}.",
            "Give the {animal} some {food}.",
            "No {food} is left, the {animal} ate it.",
        ),
    ),
)


def json_extract(rng: Random) -> tuple[str, str]:
    """Named fields of a sentence, wanted as compact JSON in the order asked for."""
    keys, sentences = rng.choice(JSON_SENTENCES)
    fields = {key: FIELD_VALUES[key](rng) for key in keys}
    sentence = rng.choice(sentences).format(**fields)
    wanted = list(keys)
    if rng.random() < 0.4:
        wanted = rng.sample(wanted, rng.randint(1, len(wanted)))
    listed = ", ".join(wanted)
    asked = rng.choice(("Extract {k} as JSON: {s}", "{s} Give me {k} as JSON.", "JSON with {k}: {s}"))
    return asked.format(k=listed, s=sentence), compact_json({key: fields[key] for key in wanted})


LABEL_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "mood": {
        "positive": (
            "I love the {item}.",
            "The {item} are wonderful.",
            "What a lovely day in {city}!",
            "{name} was very kind to us.",
            "The {food} tasted great.",
        ),
        "negative": (
            "I hate the {item}.",
            "The {item} are awful.",
            "What a terrible day in {city}!",
            "{name} was very rude to us.",
            "The {food} tasted bad.",
        ),
        "neutral": (
            "The {item} are in the box.",
            "There is a station in {city}.",
            "{name} opened the door.",
            "We have some {food}.",
            "Today is {day}.",
        ),
    },
    "topic": {
        "sport": (
            "{name} scored two goals.",
            "The team of {city} won the match.",
            "{name} runs ten miles every {day}.",
            "The race starts in {city}.",
        ),
        "travel": (
            "{name} took the train to {city}.",
            "Our flight to {city} leaves on {day}.",
            "We booked a hotel in {city}.",
            "{name} packed the bags for the trip.",
        ),
        "cooking": (
            "{name} cut the {food} into slices.",
            "Heat the oven and add the {food}.",
            "Stir the {food} with a spoon.",
            "The kitchen smelled of {food}.",
        ),
        "weather": (
            "It will rain in {city} on {day}.",
            "The sun shines over {city}.",
            "Snow fell all {day}.",
            "A strong wind blows in {month}.",
        ),
        "music": (
            "{name} plays the {instrument}.",
            "The band of {city} sang an old song.",
            "{name} practised the {instrument} on {day}.",
            "The concert in {city} was loud.",
        ),
    },
    "urgency": {
        "high": (
            "The {item} caught fire, help!",
            "{name} needs a doctor right now!",
            "Stop the machine at once!",
            "We must leave {city} immediately!",
        ),
        "low": (
            "Sometime next year I may buy {item}.",
            "{name} can answer whenever there is time.",
            "No hurry with the {item}.",
            "Let us visit {city} one day.",
        ),
    },
    "time": {
        "past": (
            "{name} went to {city}.",
            "We ate the {food} yesterday.",
            "{name} sold the {item} last {month}.",
        ),
        "future": (
            "{name} will go to {city}.",
            "We will eat the {food} tomorrow.",
            "{name} will sell the {item} next {month}.",
        ),
    },
}


def label(rng: Random) -> tuple[str, str]:
    """Sentences to be classified under a named set of labels; the answer is `label: <label>`."""
    label_set = rng.choice(tuple(LABEL_SETS))
    name = rng.choice(tuple(LABEL_SETS[label_set]))
    values = {key: make(rng) for key, make in FIELD_VALUES.items()}
    values["instrument"] = rng.choice(lexicon.KINDS["instrument"])
    sentence = rng.choice(LABEL_SETS[label_set][name]).format(**values)
    asked = rng.choice(
        ("Label the {k}: {s}", "{k} label for: {s}", "{s} Label the {k}.", "Which {k} label fits? {s}")
    )
    return asked.format(k=label_set, s=sentence), f"label: {name}"
