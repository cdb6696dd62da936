"""Regular expressions over module paths, matched in bounded time.

PEFT's `target_modules`, `rank_pattern` and the like are regular expressions written by whoever uploads an
adapter. Python's `re` backtracks, holds the interpreter lock while it does and can be made to run for years,
so one upload could stop every tenant. Here a pattern is parsed to a tree, and matching computes for each node
and start position the SET of positions where a match may end: polynomial in pattern and path, cut off by a
step budget.

Supported: everything that `re` has except backreferences, conditionals, lookbehind, atomic groups, possessive
quantifiers and inline flags, which are refused by name. Knows nothing of adapters.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

MAX_PATTERN_CHARS = 4096
_MAX_DEPTH = 40
_STEPS_BETWEEN_PAUSES = 2000
_PAUSE_S = 2e-4
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
_QUANTIFIER = re.compile(r"\{(?:([0-9]+)|([0-9]*),([0-9]*))\}")


class PatternError(ValueError):
    """The pattern is not a regular expression, uses an unsupported construct or is too expensive to match."""


class StepBudget:
    """Steps that matching may still take; several patterns may share one.

    Between steps it pauses for a moment every millisecond or two, because matching holds the interpreter
    lock, for which the engine's loop waits.
    """

    def __init__(self, max_steps: int, *, pause: Callable[[float], None] = time.sleep) -> None:
        self._max_steps = max_steps
        self._num_steps = 0
        self._pause = pause

    def spend(self) -> None:
        """Take one step. Raises PatternError when none is left."""
        self._num_steps += 1
        if self._num_steps > self._max_steps:
            raise PatternError(f"takes more than {self._max_steps} steps to match; simplify the pattern")
        if self._num_steps % _STEPS_BETWEEN_PAUSES == 0:
            self._pause(_PAUSE_S)


@dataclass(frozen=True, eq=False, slots=True)
class _Char:
    test: re.Pattern[str]


@dataclass(frozen=True, eq=False, slots=True)
class _Anchor:
    kind: str


@dataclass(frozen=True, eq=False, slots=True)
class _Sequence:
    items: tuple[_Node, ...]


@dataclass(frozen=True, eq=False, slots=True)
class _Choice:
    options: tuple[_Node, ...]


@dataclass(frozen=True, eq=False, slots=True)
class _Repeat:
    item: _Node
    min_count: int
    max_count: int | None


@dataclass(frozen=True, eq=False, slots=True)
class _Lookahead:
    item: _Node
    negative: bool


_Node: TypeAlias = _Char | _Anchor | _Sequence | _Choice | _Repeat | _Lookahead


class PathPattern:
    """A compiled pattern.

    Args:
        text: the regular expression.
        budget: what its matches are charged to.

    Raises:
        PatternError: the text is malformed, longer than `MAX_PATTERN_CHARS` or uses an unsupported construct.
    """

    def __init__(self, text: str, budget: StepBudget) -> None:
        if len(text) > MAX_PATTERN_CHARS:
            raise PatternError(f"is {len(text)} characters long; at most {MAX_PATTERN_CHARS} are allowed")
        if not text.isascii():
            raise PatternError("contains characters outside ASCII, which no module path has")
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise PatternError(f"is not a regular expression: {error}") from error
        self._root = _Parser(text).parse()
        self._budget = budget
        # Nothing in a plain name can backtrack, so the fast engine may take it.
        self._plain_tail = re.compile(rf"(?:.*\.)?{text}") if _PLAIN.fullmatch(text) else None

    def matches_all(self, path: str) -> bool:
        """True if the whole path matches, as `re.fullmatch` decides. Raises PatternError if too expensive."""
        return len(path) in _Matcher(path, self._budget).ends(self._root, 0)

    def matches_tail(self, path: str) -> bool:
        """True if the whole path, or what follows one of its dots, matches: PEFT's rule for pattern keys."""
        if self._plain_tail is not None:
            self._budget.spend()
            return self._plain_tail.fullmatch(path) is not None
        starts = [0, *(i + 1 for i, char in enumerate(path) if char == ".")]
        matcher = _Matcher(path, self._budget)
        return any(len(path) in matcher.ends(self._root, start) for start in starts)


class _Parser:
    """Recursive descent over a text that `re` has accepted."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._pos = 0
        self._depth = 0

    def parse(self) -> _Node:
        return self._choice()

    def _choice(self) -> _Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise PatternError(f"nests groups deeper than {_MAX_DEPTH}")
        options = [self._sequence()]
        while self._peek() == "|":
            self._pos += 1
            options.append(self._sequence())
        self._depth -= 1
        return options[0] if len(options) == 1 else _Choice(tuple(options))

    def _sequence(self) -> _Node:
        items: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            items.append(self._quantified(self._atom()))
        return items[0] if len(items) == 1 else _Sequence(tuple(items))

    def _quantified(self, item: _Node) -> _Node:
        bounds = self._quantifier()
        if bounds is None:
            return item
        if self._peek() == "+":
            raise PatternError("uses a possessive quantifier, which is not supported")
        if self._peek() == "?":
            self._pos += 1
        return _Repeat(item, *bounds)

    def _quantifier(self) -> tuple[int, int | None] | None:
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        char = self._peek()
        if char in simple:
            self._pos += 1
            return simple[char]
        match = _QUANTIFIER.match(self._text, self._pos)
        if match is None:
            return None
        self._pos = match.end()
        if match[1] is not None:
            return int(match[1]), int(match[1])
        return int(match[2] or 0), int(match[3]) if match[3] else None

    def _atom(self) -> _Node:
        char = self._peek()
        if char == "(":
            return self._group()
        if char == "[":
            return self._class()
        if char == "\\":
            return self._escape()
        self._pos += 1
        if char in "^$":
            return _Anchor(char)
        return _Char(re.compile("." if char == "." else re.escape(char)))

    def _group(self) -> _Node:
        self._pos += 1
        wrap: bool | None = None
        if self._peek() == "?":
            head = self._text[self._pos : self._pos + 3]
            if head.startswith("?:"):
                self._pos += 2
            elif head[:2] in ("?=", "?!"):
                wrap = head[1] == "!"
                self._pos += 2
            elif head == "?P<":
                self._pos = self._text.index(">", self._pos) + 1
            else:
                raise PatternError(f"uses the group ({head}…), which is not supported")
        inner = self._choice()
        self._pos += 1
        return inner if wrap is None else _Lookahead(inner, wrap)

    def _class(self) -> _Node:
        start = self._pos
        self._pos += 1
        if self._peek() == "^":
            self._pos += 1
        if self._peek() == "]":
            self._pos += 1
        while self._peek() != "]":
            self._pos += 2 if self._peek() == "\\" else 1
        self._pos += 1
        return _Char(re.compile(self._text[start : self._pos]))

    def _escape(self) -> _Node:
        kind = self._text[self._pos + 1]
        if kind in "bBAZ":
            self._pos += 2
            return _Anchor(kind)
        if kind.isdigit() or (kind.isalpha() and kind not in "dDwWsS"):
            raise PatternError(f"uses \\{kind}, which is not supported")
        self._pos += 2
        return _Char(re.compile(self._text[self._pos - 2 : self._pos]))

    def _peek(self) -> str:
        return self._text[self._pos : self._pos + 1]


class _Matcher:
    """End positions of nodes on one path, each computed once."""

    def __init__(self, path: str, budget: StepBudget) -> None:
        self._path = path
        self._budget = budget
        self._known: dict[tuple[int, int], frozenset[int]] = {}

    def ends(self, node: _Node, start: int) -> frozenset[int]:
        key = (id(node), start)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._compute(node, start)
        return known

    def _compute(self, node: _Node, start: int) -> frozenset[int]:
        if isinstance(node, _Char):
            self._budget.spend()
            char = self._path[start : start + 1]
            return frozenset((start + 1,)) if char and node.test.fullmatch(char) else frozenset()
        if isinstance(node, _Anchor):
            return frozenset((start,)) if self._holds(node.kind, start) else frozenset()
        if isinstance(node, _Lookahead):
            return frozenset((start,)) if bool(self.ends(node.item, start)) != node.negative else frozenset()
        if isinstance(node, _Choice):
            return frozenset().union(*(self.ends(option, start) for option in node.options))
        if isinstance(node, _Repeat):
            return self._repeat(node, start)
        reached = frozenset((start,))
        for item in node.items:
            reached = self._advance(item, reached)
        return reached

    def _repeat(self, node: _Repeat, start: int) -> frozenset[int]:
        # After this many rounds every way through has stood still once: the set no longer changes.
        rounds = len(self._path) + 1
        reached = frozenset((start,))
        for _ in range(min(node.min_count, rounds)):
            reached = self._advance(node.item, reached)
        everything = reached
        optional = rounds if node.max_count is None else min(node.max_count - node.min_count, rounds)
        for _ in range(optional):
            reached = self._advance(node.item, reached) - everything
            if not reached:
                break
            everything |= reached
        return everything

    def _advance(self, node: _Node, starts: frozenset[int]) -> frozenset[int]:
        reached: set[int] = set()
        for start in starts:
            self._budget.spend()
            reached |= self.ends(node, start)
        return frozenset(reached)

    def _holds(self, kind: str, pos: int) -> bool:
        if kind in "^A":
            return pos == 0
        if kind == "Z":
            return pos == len(self._path)
        if kind == "$":
            return pos == len(self._path) or self._path[pos:] == "\n"
        at_boundary = self._is_word(pos - 1) != self._is_word(pos)
        return at_boundary if kind == "b" else not at_boundary

    def _is_word(self, pos: int) -> bool:
        if not 0 <= pos < len(self._path):
            return False
        return self._path[pos].isalnum() or self._path[pos] == "_"
