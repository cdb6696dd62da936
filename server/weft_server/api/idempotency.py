"""The `Idempotency-Key` header: a client's name for one request, so that sending it twice does it once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import Request

from weft_server.errors import InvalidRequest
from weft_server.service.idempotency import IdempotencyKey

MAX_KEY_CHARS = 255
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def idempotency_key(request: Request, operation: str, body: Mapping[str, Any]) -> IdempotencyKey | None:
    """The request's key and a digest of its body, whatever the order of its fields; None without the header.

    Raises:
        InvalidRequest: the header is empty, too long, or has other than visible ASCII characters.
    """
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            f"The Idempotency-Key header has {len(key)} characters; it must be 1 to {MAX_KEY_CHARS} visible "
            "ASCII characters.",
            param="Idempotency-Key",
            code="invalid_value",
        )
    encoded = msgspec.json.encode(body, order="deterministic")
    return IdempotencyKey(operation, key, hashlib.sha256(encoded).hexdigest())
