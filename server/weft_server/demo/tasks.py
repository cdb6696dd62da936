"""The demo's two finetuning tasks: routing of tickets and extraction of orders.

Owns their texts, their split, their hyperparameters and the JSONL files in `data/`, which are written by
`python -m weft_server.demo.tasks` and shipped. Both answer in a form that the base has seen (a label, compact
JSON) to prompts that it has not: without an adapter it only replies politely. Knows nothing of models and
servers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from weft_server.demo import lexicon
from weft_server.demo.corpus import Exchange
from weft_server.demo.structured import compact_json

DATA_DIR = Path(__file__).parent / "data"
"""Where the shipped JSONL files lie."""

BASE_MODEL_DIR = Path(__file__).parent / "base_model"
"""Where the shipped base model lies, a Hugging Face directory."""

TICKETS: dict[str, tuple[str, ...]] = {
    "billing": (
        "I was charged twice for the {item}.",
        "The invoice shows the wrong price for the {item}.",
        "My card was charged {qty} euros too much.",
        "Please send me the invoice for the {item} again.",
        "Why is there a fee of {qty} euros on my bill?",
        "The discount is missing on my invoice.",
    ),
    "shipping": (
        "The package with the {item} has not arrived.",
        "Where is my parcel? It should be in {city} by now.",
        "My {item} were sent to {city}, but I live elsewhere.",
        "The delivery to {city} is {qty} days late.",
        "When will the {item} be delivered?",
        "The driver left the parcel at the wrong house in {city}.",
    ),
    "returns": (
        "I want to send the {item} back.",
        "The {item} do not fit, I would like a refund.",
        "How do I return the {item}?",
        "The {item} came broken, please exchange them.",
        "Please take back the {qty} {item} that I bought.",
        "I changed my mind about the {item} and want my money back.",
    ),
    "account": (
        "I forgot my password.",
        "I cannot log in to my account.",
        "Please change my email address.",
        "How do I delete my account?",
        "My account is locked since {day}.",
        "I moved to {city}, please change my address.",
    ),
    "technical": (
        "The website shows an error since {day}.",
        "Your app crashes when I open it.",
        "The button on your page does not work.",
        "The page with the {item} does not load.",
        "The search finds no {item}, it is broken.",
        "The screen stays white after the update.",
    ),
    "praise": (
        "I love the {item}, well done!",
        "Your staff in {city} were wonderful.",
        "Thank you, the {item} are great.",
        "This is the best shop in {city}.",
        "The service on {day} was excellent.",
        "My family is very happy with the {item}.",
    ),
}

ORDERS = (
    "I would like to order {qty} {item}. Please ship them to {city}.",
    "Please send {qty} {item} to {city}.",
    "We need {qty} {item} in {city}.",
    "Can you deliver {qty} {item} to my house in {city}?",
    "To our office in {city}: {qty} {item}, please.",
    "Order for {city}: {qty} {item}.",
    "I am in {city} and want to buy {qty} {item}.",
    "{qty} {item} for our shop in {city}, please.",
)

OPENERS = ("", "Hello, ", "Hi, ", "Good morning, ", "Dear team, ", "Hi, {name} here. ", "My name is {name}. ")
CLOSERS = ("", " Thanks!", " Thank you.", " Best wishes, {name}", " {name}", " Please hurry.")


@dataclass(frozen=True, slots=True)
class FinetuneTask:
    """One finetuning task with the hyperparameters that its demo job uses.

    Attributes:
        name: also the stem of its files and the adapter's name.
        title: one line for people.
        draw: draws one prompt and its answer.
        num_train: training examples.
        num_held_out: held-out examples.
        seed: seed of the examples and of the job.
        num_epochs: passes over the training examples.
        batch_size: examples per optimizer step.
        learning_rate: peak of the linear schedule, for AdamW on LoRA r 16, alpha 32, all linear layers.
    """

    name: str
    title: str
    draw: Callable[[Random], tuple[str, str]]
    num_train: int
    num_held_out: int
    seed: int
    num_epochs: int
    batch_size: int
    learning_rate: float

    @property
    def train_path(self) -> Path:
        """The shipped training file, JSONL of `messages`."""
        return DATA_DIR / f"{self.name}.train.jsonl"

    @property
    def held_out_path(self) -> Path:
        """The shipped held-out file, JSONL of `messages`."""
        return DATA_DIR / f"{self.name}.heldout.jsonl"


def in_a_letter(rng: Random, sentence: str) -> str:
    """Return `sentence` with an opener before it and a closer behind it, either possibly empty."""
    opener = rng.choice(OPENERS).format(name=rng.choice(lexicon.FIRST_NAMES))
    closer = rng.choice(CLOSERS).format(name=rng.choice(lexicon.FIRST_NAMES))
    return f"{opener}{sentence}{closer}"


def draw_ticket(rng: Random) -> tuple[str, str]:
    """Draw a customer's message and `label: <queue>`."""
    queue = rng.choice(tuple(TICKETS))
    sentence = rng.choice(TICKETS[queue]).format(
        item=rng.choice(lexicon.GOODS),
        city=rng.choice(lexicon.CITIES),
        day=rng.choice(lexicon.DAYS),
        qty=rng.randint(2, 30),
    )
    return in_a_letter(rng, sentence), f"label: {queue}"


def draw_order(rng: Random) -> tuple[str, str]:
    """Draw a customer's order and `{"item":...,"qty":...,"city":...}`."""
    item, city, qty = rng.choice(lexicon.GOODS), rng.choice(lexicon.CITIES), rng.randint(2, 30)
    sentence = rng.choice(ORDERS).format(item=item, city=city, qty=qty)
    return in_a_letter(rng, sentence), compact_json({"item": item, "qty": qty, "city": city})


TICKET_ROUTING = FinetuneTask(
    name="ticket-routing",
    title="Route customer messages to one of six queues",
    draw=draw_ticket,
    num_train=300,
    num_held_out=120,
    seed=11,
    num_epochs=4,
    batch_size=8,
    learning_rate=3e-3,
)

ORDER_EXTRACTION = FinetuneTask(
    name="order-extraction",
    title="Turn orders into JSON",
    draw=draw_order,
    num_train=300,
    num_held_out=120,
    seed=12,
    num_epochs=3,
    batch_size=8,
    learning_rate=2e-3,
)

FINETUNE_TASKS = (TICKET_ROUTING, ORDER_EXTRACTION)


def generate(task: FinetuneTask) -> tuple[list[Exchange], list[Exchange]]:
    """Return the training and held-out examples of `task`; no prompt occurs twice, in either."""
    rng = Random(task.seed)
    drawn: dict[str, Exchange] = {}
    while len(drawn) < task.num_train + task.num_held_out:
        prompt, answer = task.draw(rng)
        drawn.setdefault(prompt, Exchange(task.name, prompt, answer))
    examples = list(drawn.values())
    return examples[: task.num_train], examples[task.num_train :]


def to_jsonl(examples: Sequence[Exchange]) -> str:
    """Return the examples as JSONL of `{"messages": [user, assistant]}`."""
    lines = []
    for example in examples:
        messages = [
            {"role": "user", "content": example.prompt},
            {"role": "assistant", "content": example.answer},
        ]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def from_jsonl(path: Path, task_name: str) -> list[Exchange]:
    """Read examples that `to_jsonl` has written.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not JSON of one user and one assistant message.
    """
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        examples.append(Exchange(task_name, user["content"], assistant["content"]))
    return examples


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the JSONL files of all tasks."""
    parser = argparse.ArgumentParser(description="Write the demo's finetuning data.")
    parser.add_argument("--out", type=Path, default=DATA_DIR, help="directory to write")
    out: Path = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    for task in FINETUNE_TASKS:
        train, held_out = generate(task)
        (out / task.train_path.name).write_text(to_jsonl(train), encoding="utf-8")
        (out / task.held_out_path.name).write_text(to_jsonl(held_out), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
