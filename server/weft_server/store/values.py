"""How record and event values are written: ASCII JSON text, the same in every store."""

from __future__ import annotations

import json
from typing import cast

from weft_server.store.base import JsonObject


def encode_value(value: JsonObject) -> str:
    """JSON text of a value.

    Raises:
        ValueError: NaN or an infinity, which JSON does not have.
        TypeError: something JSON cannot express.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def decode_value(text: str | bytes) -> JsonObject:
    """The value that `encode_value` wrote; always a fresh object."""
    return cast(JsonObject, json.loads(text))
