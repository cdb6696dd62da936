"""Typed reads from a JSON configuration, and the error for a base model that cannot be served.

Knows what a positive count or a flag is, not which fields a model has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft_server.errors import WeftError


class ModelError(WeftError):
    """500: the base model's files are missing, damaged, contradictory or of an unsupported kind."""

    default_code = "bad_model"


class ConfigFields:
    """Typed access to a configuration; for `get` and the typed reads, JSON null counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = values
        self._where = where

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> Any:
        """The raw value, or None."""
        return self._values.get(name)

    def bad(self, name: str, wanted: str) -> ModelError:
        """The error that says what field `name` holds and what it should."""
        return ModelError(f"{self._where}: {name}={self.get(name)!r} should be {wanted}", param=name)

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number >= 1. Raises ModelError when it is not, or absent without a default."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.bad(name, "a positive whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number > 0. Raises ModelError when it is not, or absent without a default."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise self.bad(name, "a positive number")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A number > 0, or None when absent."""
        return None if self.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        """True or false. Raises ModelError when it is neither."""
        value = self._present(name, default)
        if not isinstance(value, bool):
            raise self.bad(name, "true or false")
        return value

    def _present(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self._where}: {name} is missing", param=name)
        return value
