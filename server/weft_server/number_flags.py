"""Types of numeric flags for argparse: each refuses what is not allowed, and says what is.

Imports nothing that computes, so that `weft --help` stays quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import inf
from typing import TypeVar

_Number = TypeVar("_Number", int, float)


def positive(text: str) -> float:
    """A finite number above 0."""
    return _checked(text, float, lambda value: 0.0 < value < inf, "a number above 0")


def from_zero(text: str) -> float:
    """A finite number from 0."""
    return _checked(text, float, lambda value: 0.0 <= value < inf, "a number from 0")


def count(text: str) -> int:
    """A whole number from 0."""
    return whole_from(0)(text)


def whole_from(lowest: int) -> Callable[[str], int]:
    """A whole number from `lowest`."""
    return lambda text: _checked(text, int, lambda value: value >= lowest, f"a whole number from {lowest}")


def _checked(
    text: str, kind: Callable[[str], _Number], is_allowed: Callable[[_Number], bool], wanted: str
) -> _Number:
    try:
        value = kind(text)
        if is_allowed(value):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give {wanted}")
