"""Models as a request names them: the base, an adapter, or one version of it.

Reads the adapter records that `service/adapters.py` writes; owns the rule by which a name becomes an
immutable `AdapterRef`, and the model list. A name that was resolved before stays servable while the store is
away.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from weft_server.errors import NotFound
from weft_server.protocol import AdapterRef
from weft_server.store.base import Record, RecordStore, StoreUnavailable

ADAPTER_KIND = "adapter"
MAX_REMEMBERED = 10_000

_MODEL = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})(?:@(?P<version>[1-9][0-9]{0,8}))?")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """What a `model` field stands for: its canonical id, and the adapter version (None for the base)."""

    id: str
    adapter: AdapterRef | None


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One entry of the model list.

    `parent` is the base's name for an adapter; `root` the exact version served.
    """

    id: str
    created: int
    owned_by: str
    root: str
    parent: str | None


class ModelService:
    """Resolves and lists models, each tenant seeing the base and its own adapters."""

    def __init__(self, records: RecordStore, base_name: str, base_created: int) -> None:
        """
        Args:
            records: where adapter records are.
            base_name: the served name of the base.
            base_created: seconds since the epoch, reported as the base's `created`.
        """
        self._records = records
        self._base_name = base_name
        self._base_created = base_created
        self._remembered: OrderedDict[tuple[str, str], dict[str, Any]] = OrderedDict()

    @property
    def base_name(self) -> str:
        """The served name of the base."""
        return self._base_name

    async def resolve(self, tenant: str, model: str) -> ResolvedModel:
        """The adapter version that `model` (base, `name` or `name@3`) means for this tenant now.

        Raises:
            NotFound: `model_not_found`; absent or another tenant's.
            StoreUnavailable: the store is away and the name was not resolved before.
        """
        if model == self._base_name:
            return ResolvedModel(model, None)
        match = _MODEL.fullmatch(model)
        if match is None:
            raise model_not_found(model)
        value = await self._adapter_value(tenant, match["name"], model)
        version = match["version"] or str(value["newest"])
        stored = value["versions"].get(version)
        if stored is None:
            raise model_not_found(model)
        return ResolvedModel(model, adapter_ref(stored))

    async def list(self, tenant: str) -> list[ModelCard]:
        """The base, then the tenant's adapters, newest first."""
        records = await asyncio.to_thread(self._records.list, ADAPTER_KIND, tenant)
        return [
            self._base_card(),
            *(self._adapter_card(tenant, record.id, record.value) for record in records),
        ]

    async def get(self, tenant: str, model: str) -> ModelCard:
        """One entry of the list, or of one version (`name@3`).

        Raises:
            NotFound: `model_not_found`.
        """
        if model == self._base_name:
            return self._base_card()
        await self.resolve(tenant, model)
        name, _, version = model.partition("@")
        value = await self._adapter_value(tenant, name, model)
        return self._adapter_card(tenant, name, value, version or None)

    async def _adapter_value(self, tenant: str, name: str, model: str) -> dict[str, Any]:
        key = (tenant, name)
        record: Record | None
        try:
            record = await asyncio.to_thread(self._records.get, ADAPTER_KIND, tenant, name)
        except StoreUnavailable:
            if key in self._remembered:
                return self._remembered[key]
            raise
        if record is None:
            self._remembered.pop(key, None)
            raise model_not_found(model)
        self._remembered[key] = record.value
        self._remembered.move_to_end(key)
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        return record.value

    def _base_card(self) -> ModelCard:
        return ModelCard(self._base_name, self._base_created, "weft", self._base_name, None)

    def _adapter_card(
        self, tenant: str, name: str, value: dict[str, Any], version: str | None = None
    ) -> ModelCard:
        shown = version or str(value["newest"])
        created = value["versions"][shown]["created_at"] if version else value["created_at"]
        model_id = f"{name}@{version}" if version else name
        return ModelCard(model_id, int(created), tenant, f"{name}@{shown}", self._base_name)


def adapter_ref(stored: dict[str, Any]) -> AdapterRef:
    """The engine's reference of one stored adapter version."""
    return AdapterRef(
        digest=stored["digest"],
        config_blob=stored["config_blob"],
        weights_blob=stored["weights_blob"],
        weights_bytes=int(stored["weights_bytes"]),
    )


def model_not_found(model: str) -> NotFound:
    """404 as OpenAI words it."""
    return NotFound(
        f"The model '{model}' does not exist, or you do not have access to it. GET /v1/models lists yours.",
        param="model",
        code="model_not_found",
    )
