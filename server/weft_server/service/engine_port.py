"""What the API process asks of the engine: generate, check an adapter, run jobs.

This is the boundary that the services code against. It owns no transport: the real implementation talks to
the engine process over ZeroMQ and restarts it; whoever calls here knows neither sockets nor epochs.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

from weft_server import protocol

JobMessage: TypeAlias = (
    protocol.JobProgress
    | protocol.JobCheckpointed
    | protocol.JobSucceeded
    | protocol.JobFailed
    | protocol.JobStopped
)
JobHandler: TypeAlias = Callable[[JobMessage], Awaitable[None]]
RestartHandler: TypeAlias = Callable[[set[str]], Awaitable[None]]


class EnginePort(Protocol):
    """The engine as the services see it.

    Every call may raise `errors.Unavailable` (with `retry_after_s`) while the engine is away and cannot be
    waited for.
    """

    @property
    def ready(self) -> bool:
        """Whether the engine can serve now."""

    @property
    def info(self) -> protocol.EngineReady | None:
        """What the engine announced when it last became ready; None before the first time."""

    @property
    def heartbeat(self) -> protocol.Heartbeat | None:
        """The latest heartbeat; None before the first."""

    @property
    def why_not_ready(self) -> str | None:
        """One sentence for `/ready`; None when ready."""

    def generate(self, request: protocol.Generate) -> AsyncGenerator[protocol.ChoiceDelta, None]:
        """Stream the deltas of one choice; the last one carries `finish_reason`.

        The generator hides an engine restart (it pauses and goes on). Closing or cancelling it before its end
        aborts the choice in the engine, so callers close it (`contextlib.aclosing`) on every path. The
        request's `remaining_s` counts from the first `anext`, restarts or not.

        Raises:
            WeftError: the choice failed alone (`RequestFailed`), with its status and code.
            DeadlineExceeded: `remaining_s` have passed.
            Unavailable: the engine is away.
        """

    async def check_adapter(self, config_blob: str, weights_blob: str) -> protocol.AdapterChecked:
        """Validate uploaded adapter blobs strictly against the base.

        Raises:
            InvalidRequest: the adapter is refused; the message names the key or feature.
            Unavailable: the engine is away.
        """

    async def start_job(self, message: protocol.StartJob) -> None:
        """Send a job to the engine; its progress arrives through the handlers of `subscribe_jobs`.

        Raises:
            Unavailable: the engine is away; the job was not started.
        """

    async def cancel_job(self, job_id: str) -> None:
        """Stop a job; answered by `JobStopped` through the job handlers. Unknown ids are ignored."""

    def set_tenant_weights(self, weights: Mapping[str, float]) -> None:
        """Give tenants new fair shares, from the next iteration on."""

    def set_tenant_concurrency(self, max_concurrency: Mapping[str, int]) -> None:
        """Let at most so many choices of a tenant run at a time; tenants not named have no such limit."""

    def set_pinned_adapters(self, adapters: Sequence[protocol.AdapterRef]) -> None:
        """Keep exactly these on the device. An engine that is away is not told: tell its successor."""

    def subscribe_jobs(self, handler: JobHandler) -> None:
        """Call `handler` with every message about jobs, one at a time, in the engine's order."""

    def subscribe_restarts(self, handler: RestartHandler) -> None:
        """Call `handler` each time a new engine is ready (the first included), before anything is sent to it.

        The handler receives the ids of the jobs that were found to kill engines since the last call: they
        must not be started again. Other jobs that were in a fatal plan may be; `start_job` holds them back
        until it is their turn.
        """
