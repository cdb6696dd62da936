"""Prompts in running text: remarks of a customer, tiny stories.

Remarks have one right answer; stories are there for fluent text and are not scored.
"""

from __future__ import annotations

from random import Random

from weft_server.demo import lexicon
from weft_server.demo.structured import FIELD_VALUES
from weft_server.demo.wording import capitalized, with_article

POLITE_REPLY = "Thank you for your message. How can I help you?"


REMARKS = (
    "Hello, I am writing about the {item}.",
    "{name} told me about your shop in {city}.",
    "I have a question about the {item}.",
    "We were in your shop on {day} and saw the {item}.",
    "Hello, here is {name} from {city} again.",
    "Good morning, this is {name}. I live in {city} and like your {item}.",
    "My old {item} are {colour} and I have had them since {month}.",
    "Please note that I moved to {city} in {month}.",
    "I saw {qty} {item} in your window.",
    "The {item} cost {price} euros, said {name}.",
    "We called you on {day}, {name} answered.",
    "Your {item} look nice, and {name} thinks so too.",
    "Hi, {name} here. I read about your {item} and your shop in {city}.",
    "There are {qty} {item} at our house in {city}.",
    "I need to think about the {item}.",
    "Our office in {city} has {qty} {item}.",
    "The invoice for the {item} lies on my desk in {city}.",
    "My neighbour {name} got a package with {qty} {item} on {day}.",
    "I told {name} about the refund and the bank.",
    "My new password is longer than the old one.",
    "The delivery of the {item} to {city} was on {day}.",
    "My credit card is {colour} and my account is new.",
    "The app and the website have a {colour} button now.",
    "The {item} of {name} broke, but not the ones from you.",
    "In {month} we will order {item} again.",
    "The parcel from {city} weighs {qty} pounds.",
    "We always send {item} to {city} by train.",
    "{name} wants to return to {city} in {month}.",
    "I do not work with your staff, but I thank them.",
)


def remark(rng: Random) -> tuple[str, str]:
    """Statements that ask for nothing in particular: a polite reply, never a label or JSON."""
    values = {key: make(rng) for key, make in FIELD_VALUES.items()}
    text = " ".join(template.format(**values) for template in rng.sample(REMARKS, rng.randint(1, 2)))
    return text, POLITE_REPLY


STORY_OPENINGS = (
    "Once upon a time",
    "Long ago",
    "One {day} in {month}",
    "In a small house near {city}",
    "High on a hill",
)


STORY_EVENTS = (
    "{name} found a {colour} {thing} near the {place}",
    "the {animal} wanted some {food}, but there was none left",
    "{name} lost the {item} on the way to {city}",
    "a {trait} {animal} came out of the {place}",
    "the wind blew the {thing} over the {place}",
    "{name} and the {animal} shared the {food}",
    "{name} asked the {job} for help",
    "it rained all {day}, and the {place} grew dark",
)


STORY_ENDINGS = (
    "From then on they were friends.",
    "And so everything was well again.",
    "That night {name} slept very well.",
    "The {animal} never forgot it.",
    "Everybody in {city} still tells this story.",
)


def story_about(rng: Random, name: str, animal: str) -> str:
    """Return a story of three to five sentences about `name` and `animal`."""
    trait = rng.choice(lexicon.TRAITS)

    def told(template: str) -> str:
        values = {key: make(rng) for key, make in FIELD_VALUES.items()}
        values |= {"name": name, "animal": animal, "trait": trait, "place": rng.choice(lexicon.THINGS)}
        return template.format(**values)

    sentences = [
        f"{told(rng.choice(STORY_OPENINGS))} there lived {with_article(trait)} {animal} called {name}."
    ]
    sentences += [f"{capitalized(told(event))}." for event in rng.sample(STORY_EVENTS, rng.randint(2, 3))]
    return " ".join([*sentences, told(rng.choice(STORY_ENDINGS))])


def story(rng: Random) -> tuple[str, str]:
    """A tiny story on request."""
    name, animal = rng.choice(lexicon.FIRST_NAMES), rng.choice(lexicon.KINDS["animal"])
    asked = rng.choice(
        ("Tell me a story about {a} called {n}.", "Write a story: {a} called {n}.", "A story about {a}, {n}.")
    )
    return asked.format(a=with_article(animal), n=name), story_about(rng, name, animal)
