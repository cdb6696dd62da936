"""Requests at their times, answered or not: an open loop, in one asyncio process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from weft_server.bench.serve.client import Client, Reply
from weft_server.bench.serve.workload import LoadRequest

PATH = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Sent:
    """A request and its reply. `due_s` is when it was to leave, on the reply's clock."""

    request: LoadRequest
    due_s: float
    reply: Reply

    @property
    def lag_s(self) -> float:
        """How late the client was."""
        return max(0.0, self.reply.sent_s - self.due_s)


@dataclass(frozen=True, slots=True)
class Run:
    """All requests of a window of `seconds`, and the processor time that the client took for them."""

    sent: tuple[Sent, ...]
    began_s: float
    seconds: float
    client_cpu_s: float


async def send_all(
    client: Client, requests: Sequence[LoadRequest], keys: Sequence[str | None], seconds: float
) -> Run:
    """Send every request at its time, wait for all answers, and for the end of the window."""
    began_s, cpu_s = time.perf_counter(), time.process_time()

    async def send(request: LoadRequest, due_s: float) -> Sent:
        key = keys[request.tenant_idx % len(keys)]
        return Sent(request, due_s, await client.stream(PATH, request.body, key))

    tasks = []
    for request in requests:
        due_s = began_s + request.arrival_s
        # One timer at a time, in order: thousands of pending ones would cost the loop more than the requests.
        await asyncio.sleep(due_s - time.perf_counter())
        tasks.append(asyncio.create_task(send(request, due_s)))
    sent = await asyncio.gather(*tasks)
    await asyncio.sleep(began_s + seconds - time.perf_counter())
    return Run(tuple(sent), began_s, seconds, time.process_time() - cpu_s)
