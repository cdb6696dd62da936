"""Query strings: a parameter that no route knows is refused, as in a body.

Knows names only; types and ranges are FastAPI's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Depends, Request

from weft_server.errors import InvalidRequest


def only_query(*names: str, is_also: Callable[[str], bool] | None = None) -> Any:
    """A route dependency that refuses any query parameter but these.

    Args:
        names: the allowed ones.
        is_also: accepts names that follow a pattern.
    """

    async def check(request: Request) -> None:
        for name in request.query_params:
            if name not in names and not (is_also is not None and is_also(name)):
                allowed = ", ".join(names) or "none"
                raise InvalidRequest(
                    f"Unknown query parameter: '{name}'. Allowed: {allowed}.",
                    param=name,
                    code="unknown_parameter",
                )

    checked: Callable[[Request], Awaitable[None]] = check
    return Depends(checked)
