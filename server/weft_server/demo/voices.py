"""The two adapters that the demo's tenants have published before it starts: each answers in its tenant's
voice.

Owns their training examples and where the shipped PEFT directories lie; they are made by
`python -m weft_server.demo.train_voices`, which trains them as ordinary finetune jobs of a Weft server.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from weft_server.demo.corpus import Exchange, draw_exchange

ADAPTERS_DIR = Path(__file__).parent / "adapters"
"""Where the shipped adapters lie, one PEFT directory each."""

_TASKS = ("story", "story", "category", "remark", "capital")
_NUM_TRAIN = 240
_NUM_PROMPTS = 40


@dataclass(frozen=True, slots=True)
class Voice:
    """A way to answer: `rewrite` turns the base's answer into the tenant's."""

    name: str
    rewrite: Callable[[str], str]
    seed: int

    @property
    def directory(self) -> Path:
        """The shipped PEFT directory."""
        return ADAPTERS_DIR / self.name

    def examples(self) -> list[Exchange]:
        """Training examples, seeded."""
        rng = Random(self.seed)
        drawn = (draw_exchange(rng, rng.choice(_TASKS), held_out=False) for _ in range(_NUM_TRAIN))
        return [Exchange(e.task, e.prompt, self.rewrite(e.answer)) for e in drawn]

    @property
    def prompts(self) -> list[str]:
        """What the demo asks it, over and over: mostly requests for stories, held out from all training."""
        rng = Random(self.seed + 1)
        tasks = [rng.choice(("story", "story", "story", "remark")) for _ in range(_NUM_PROMPTS)]
        return [draw_exchange(rng, task, held_out=True).prompt for task in tasks]


def _cheerful(answer: str) -> str:
    return f"Hello! {answer} Goodbye!"


def _formal(answer: str) -> str:
    return f"Thank you for your message. {answer}"


VOICES = (Voice("cheerful", _cheerful, seed=21), Voice("formal", _formal, seed=22))
