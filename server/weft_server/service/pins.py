"""Pinned adapters: which names are to stay on the device, within which limits, and the engine that is told.

The pin is a field of the adapter's record, so that it outlives every process and passes to each new version
of the name. The engine always gets the whole set: after every change, and whenever a new engine is ready.
Owns the flow; knows nothing of HTTP, and of the arena only what the engine has announced.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from weft_server.errors import Conflict, Unavailable
from weft_server.protocol import AdapterRef, EngineReady
from weft_server.service.adapter_versions import ADAPTER_KIND, Adapter, AdapterVersion, pinning
from weft_server.service.engine_port import EnginePort
from weft_server.service.models import model_not_found
from weft_server.store.base import Record, RecordStore, StaleRecord, StoreUnavailable

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 2.0
_BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


class AdapterPins:
    """The pins of all tenants of one server."""

    def __init__(self, records: RecordStore, engine: EnginePort, share: Callable[[str], float]) -> None:
        """Subscribes to the engine: construct it before the engine starts.

        Args:
            records: where adapters are.
            engine: keeps the pinned ones on the device.
            share: the part, 0 to 1, of what may be pinned at all that a tenant may pin.
        """
        self._records = records
        self._engine = engine
        self._share = share
        self._lock = asyncio.Lock()
        self._telling = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        engine.subscribe_restarts(self._engine_restarted)

    async def pin(self, tenant: str, name: str) -> Adapter:
        """Keep the newest version of a name on the device from now on. Pinning twice is pinning once.

        Raises:
            NotFound: absent, or another tenant's.
            Conflict: the tenant's pinned adapters would take more than they may.
            Unavailable: no engine has been ready yet, so that the limits are not known.
        """
        async with self._lock:
            while True:
                record = await self._record(tenant, name)
                if Adapter.from_record(record).pinned:
                    return Adapter.from_record(record)
                await self._check_limits(tenant, Adapter.from_record(record))
                changed = await self._try_set(record, pinned=True)
                if changed is not None:
                    return changed

    async def unpin(self, tenant: str, name: str) -> Adapter:
        """Let a name's adapter leave the device like any other.

        Raises:
            NotFound: absent, or another tenant's.
        """
        async with self._lock:
            while True:
                record = await self._record(tenant, name)
                if not Adapter.from_record(record).pinned:
                    return Adapter.from_record(record)
                changed = await self._try_set(record, pinned=False)
                if changed is not None:
                    return changed

    def refresh(self) -> None:
        """Tell the engine the present pins soon: a name has been published or deleted."""
        task = asyncio.get_running_loop().create_task(self._tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _engine_restarted(self, suspects: set[str]) -> None:
        """Returns at once: serving must not wait for a store that is away."""
        del suspects
        self.refresh()

    async def _try_set(self, record: Record, *, pinned: bool) -> Adapter | None:
        try:
            changed, *_ = await asyncio.to_thread(self._records.apply, pinning(record, pinned=pinned))
        except StaleRecord:
            return None
        self.refresh()
        return Adapter.from_record(changed)

    async def _check_limits(self, tenant: str, adapter: Adapter) -> None:
        info = self._engine.info
        if info is None:
            raise Unavailable("The engine is loading; pin the adapter later.", retry_after_s=_RETRY_AFTER_S)
        others = await self._pinned()
        if len(others) + 1 > info.max_pinned_adapters:
            raise Conflict(
                f"{len(others)} adapters are pinned, and {info.max_pinned_adapters} may be on this server: "
                "unpin one first.",
                code="pin_limit_exceeded",
            )
        most = int(info.pinned_arena_bytes * self._share(tenant))
        held = sum(_arena_bytes(other.newest, info) for owner, other in others if owner == tenant)
        size = _arena_bytes(adapter.newest, info)
        if held + size > most:
            raise Conflict(
                f"'{adapter.name}' takes {_mib(size)} of the adapter arena; beside the {_mib(held)} that are "
                f"pinned already it would exceed the {_mib(most)} that this tenant may pin: unpin another "
                "adapter, or let the operator raise --adapter-arena-mb.",
                code="pin_limit_exceeded",
            )

    async def _pinned(self) -> list[tuple[str, Adapter]]:
        """Tenant and adapter of every pin, the oldest name first."""
        records = await asyncio.to_thread(self._records.list, ADAPTER_KIND, None, newest_first=False)
        pinned = ((record.tenant, Adapter.from_record(record)) for record in records)
        return [(tenant, adapter) for tenant, adapter in pinned if adapter.pinned]

    async def _record(self, tenant: str, name: str) -> Record:
        record = await asyncio.to_thread(self._records.get, ADAPTER_KIND, tenant, name)
        if record is None:
            raise model_not_found(name)
        return record

    async def _tell(self) -> None:
        """Send the engine all pins, trying again while the store is away."""
        while not await self._try_tell():
            await asyncio.sleep(_RETRY_AFTER_S)

    async def _try_tell(self) -> bool:
        """One reading and sending at a time, so that the engine hears the newest last."""
        async with self._telling:
            try:
                self._engine.set_pinned_adapters(await self._refs())
            except StoreUnavailable as error:
                log.warning("pinned adapters cannot be read: %s", error.message)
                return False
            return True

    async def _refs(self) -> list[AdapterRef]:
        info = self._engine.info
        fingerprint = "" if info is None else info.base_fingerprint
        return [
            adapter.newest.ref
            for _, adapter in await self._pinned()
            if adapter.newest.base_fingerprint == fingerprint
        ]


def _arena_bytes(version: AdapterVersion, info: EngineReady) -> int:
    return version.num_parameters * _BYTES_PER_ELEMENT[info.dtype]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.1f} MiB"
