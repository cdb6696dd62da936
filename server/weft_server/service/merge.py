"""Merging asynchronous generators: items of all, in the order in which they come; or giving one up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

_MAX_QUEUED_PER_STREAM = 16


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Yield from all streams at once until all end.

    The first stream to raise ends the merge with its exception. However the merge ends, every stream has been
    closed when it returns.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    queue: asyncio.Queue[T | _End] = asyncio.Queue(_MAX_QUEUED_PER_STREAM * max(1, len(streams)))

    async def pump(stream: AsyncGenerator[T, None]) -> None:
        error: BaseException | None = None
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put(item)
        except Exception as raised:
            error = raised
        await queue.put(_End(error))

    pumps = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        num_open = len(pumps)
        while num_open:
            got = await queue.get()
            if not isinstance(got, _End):
                yield got
            elif got.error is not None:
                raise got.error
            else:
                num_open -= 1
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def unless_first(stream: AsyncGenerator[T, None], error: asyncio.Future[E]) -> AsyncGenerator[T, None]:
    """Yield from `stream`, unless `error` comes before its first item.

    The stream has been closed when this returns.

    Raises:
        E: it came first.
    """
    async with aclosing(stream):
        first = asyncio.ensure_future(anext(stream, None))
        try:
            either: set[asyncio.Future[Any]] = {first, error}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if error.done():
                raise error.result()
        finally:
            if not first.done():
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
        item = first.result()
        if item is None:
            return
        yield item
        async for item in stream:
            yield item


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error
