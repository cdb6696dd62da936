"""One open generation as the engine's client keeps it: what was asked, what came back, and until when."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from weft_server.errors import DeadlineExceeded, WeftError
from weft_server.protocol import ChoiceDelta, Generate

_DEADLINE_GRACE_S = 1.0
"""How long after a deadline the engine, which knows it too, is given to say so."""


@dataclass(slots=True)
class OpenStream:
    """The request as first sent, and what came back. `deadline_s` is on this process's monotonic clock."""

    request: Generate
    queue: asyncio.Queue[ChoiceDelta | WeftError]
    deadline_s: float | None
    sent: list[int] = field(default_factory=list)

    @classmethod
    def begin(cls, request: Generate) -> OpenStream:
        """A stream whose time runs from now on."""
        left_s = request.remaining_s
        return cls(request, asyncio.Queue(), None if left_s is None else time.monotonic() + left_s)

    def resubmission(self) -> Generate:
        """The request as a new engine gets it: behind what was sent, with the time that is left."""
        left_s = None if self.deadline_s is None else self.deadline_s - time.monotonic()
        return replace(self.request, generated=list(self.sent), remaining_s=left_s)

    async def next(self, is_engine_ready: Callable[[], bool]) -> ChoiceDelta | WeftError:
        """What comes next, or the passing of the deadline: at once if no engine is there to tell."""
        if self.deadline_s is None:
            return await self.queue.get()
        for grace_s in (0.0, _DEADLINE_GRACE_S):
            if grace_s and not is_engine_ready():
                break
            left_s = self.deadline_s + grace_s - time.monotonic()
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(self.queue.get(), max(0.0, left_s))
        return DeadlineExceeded("the request's deadline has passed")
