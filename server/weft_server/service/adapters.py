"""Adapters by hand: upload, load from the operator's folder, list, download, delete.

An upload is acknowledged once the engine has checked it against the base and a new version is durable. Owns
the flow; `adapter_versions.py` owns the records, the engine what a valid adapter is. Knows nothing of HTTP,
tensors or requests.
"""

from __future__ import annotations

import asyncio
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from weft_server.errors import Forbidden, Internal, InvalidRequest, NotFound
from weft_server.metrics import Metrics
from weft_server.protocol import AdapterChecked, AdapterRef
from weft_server.service.adapter_versions import (
    ADAPTER_KIND,
    RETIRED_KIND,
    Adapter,
    AdapterVersion,
    check_name,
    expiry,
    publication,
    removal,
    version_counter,
)
from weft_server.service.engine_port import EnginePort
from weft_server.service.files import open_blob
from weft_server.service.models import model_not_found
from weft_server.service.pins import AdapterPins
from weft_server.store.base import BlobMissing, BlobStore, Record, RecordStore, StaleRecord

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
_MODEL = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})(?:@(?P<version>[1-9][0-9]{0,8}))?")
_TAR_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Download:
    """A tar stream of known length; consume `chunks` in a thread."""

    filename: str
    num_bytes: int
    chunks: Iterator[bytes]


class AdapterService:
    """A tenant's adapters."""

    def __init__(
        self,
        records: RecordStore,
        blobs: BlobStore,
        engine: EnginePort,
        metrics: Metrics,
        *,
        base_name: str,
        adapter_root: Path | None,
        pin_share: Callable[[str], float] = lambda _tenant: 1.0,
    ) -> None:
        """Subscribes to the engine: construct it before the engine starts.

        Args:
            records, blobs: the stores.
            engine: checks uploads against the base.
            metrics: counts published versions.
            base_name: the served name of the base, which no adapter may take.
            adapter_root: folder below which `load` may read, each tenant in its own subfolder; None forbids
                it.
            pin_share: the part, 0 to 1, of what may be pinned at all that a tenant may pin.
        """
        self._records = records
        self._blobs = blobs
        self._engine = engine
        self._metrics = metrics
        self._base_name = base_name
        self._adapter_root = adapter_root
        self.pins = AdapterPins(records, engine, pin_share)

    def check_name(self, name: str, *, param: str = "name") -> None:
        """Refuse what no adapter may be called.

        Raises:
            Unprocessable: the name is malformed.
            Conflict: it is the base model's.
        """
        check_name(name, base_name=self._base_name, param=param)

    async def upload(self, tenant: str, name: str, config: BinaryIO, weights: BinaryIO) -> Adapter:
        """Publish a new version of `name` from the two files of a PEFT directory.

        Raises:
            InvalidRequest: the adapter is refused; the message names the key or feature.
            Unprocessable: the name is malformed.
            Conflict: the name is the base's.
            Unavailable: the engine or the store is away.
        """
        self.check_name(name)
        return await self._accept(tenant, name, config, weights, source="upload")

    async def load(self, tenant: str, name: str, path: str, *, replace_existing: bool = False) -> Adapter:
        """Publish an adapter from a directory below `<adapter_root>/<tenant>/`.

        Raises:
            Forbidden: there is no adapter root, or the path leads out of the tenant's folder.
            InvalidRequest: the name exists and `replace_existing` is False, or the adapter is refused.
            NotFound: the directory or one of its files is absent.
        """
        self.check_name(name, param="lora_name")
        folder = self._tenant_folder(tenant)
        if not replace_existing and await self._record(tenant, name) is not None:
            raise InvalidRequest(
                f"The adapter '{name}' is already loaded; set load_inplace to true to publish a new version.",
                param="lora_name",
                code="adapter_exists",
            )
        with ExitStack() as stack:
            config, weights = await asyncio.to_thread(_open_peft_directory, folder, path)
            stack.enter_context(config)
            stack.enter_context(weights)
            return await self._accept(tenant, name, config, weights, source="path")

    async def list(self, tenant: str) -> list[Adapter]:
        """The tenant's adapters, newest name first."""
        records = await asyncio.to_thread(self._records.list, ADAPTER_KIND, tenant)
        return [Adapter.from_record(record) for record in records]

    async def get(self, tenant: str, name: str) -> Adapter:
        """One adapter with all its versions.

        Raises:
            NotFound: absent, or another tenant's.
        """
        record = await self._record(tenant, name)
        if record is None:
            raise model_not_found(name)
        return Adapter.from_record(record)

    async def find_version(self, tenant: str, model: str) -> tuple[Record, AdapterVersion]:
        """The record and version that `name` or `name@3` means now.

        Raises:
            NotFound: absent, or another tenant's.
        """
        match = _MODEL.fullmatch(model)
        record = await self._record(tenant, match["name"]) if match else None
        if match is None or record is None:
            raise model_not_found(model)
        adapter = Adapter.from_record(record)
        return record, _version(adapter, int(match["version"]) if match["version"] else None, model)

    async def read_config(self, version: AdapterVersion) -> bytes:
        """The version's `adapter_config.json`.

        Raises:
            Internal: the bytes are gone from the store.
        """
        try:
            return await asyncio.to_thread(self._blobs.read_bytes, version.ref.config_blob)
        except BlobMissing:
            raise _bytes_gone() from None

    async def delete(self, tenant: str, name: str) -> None:
        """Delete a name with all its versions; requests in flight finish on what they started with.

        Raises:
            Forbidden: it is the base model.
            NotFound: absent, or another tenant's.
        """
        if name == self._base_name:
            raise Forbidden(
                f"'{name}' is the base model, which all adapters share; only adapters can be deleted or "
                "unloaded."
            )
        while True:
            record = await self._record(tenant, name)
            if record is None:
                raise model_not_found(name)
            now = await asyncio.to_thread(self._records.now)
            try:
                await asyncio.to_thread(self._records.apply, removal(record, now=now))
            except StaleRecord:
                continue
            if Adapter.from_record(record).pinned:
                self.pins.refresh()
            return

    async def download(self, tenant: str, name: str, number: int | None = None) -> Download:
        """A version (the newest unless numbered) as a tar of its PEFT directory.

        Raises:
            NotFound: absent, or another tenant's.
            Internal: the bytes are gone from the store.
        """
        version = _version(
            await self.get(tenant, name), number, name if number is None else f"{name}@{number}"
        )
        return await asyncio.to_thread(self._tar, name, version)

    async def sweep_retired(self) -> None:
        """Let the blobs of adapters go that were deleted more than the grace period ago."""
        await asyncio.to_thread(self._sweep_retired)

    async def _accept(
        self,
        tenant: str,
        name: str,
        config: BinaryIO,
        weights: BinaryIO,
        *,
        source: Literal["upload", "path"],
    ) -> Adapter:
        config_blob = await asyncio.to_thread(self._put_config, config)
        weights_blob = await asyncio.to_thread(self._blobs.put_file, weights)
        checked = await self._engine.check_adapter(config_blob, weights_blob)
        adapter = await self._publish(tenant, name, checked, config_blob, weights_blob)
        self._metrics.adapter_published(tenant, source)
        if adapter.pinned:
            self.pins.refresh()
        return adapter

    async def _publish(
        self, tenant: str, name: str, checked: AdapterChecked, config_blob: str, weights_blob: str
    ) -> Adapter:
        info = self._engine.info
        version = AdapterVersion(
            number=await asyncio.to_thread(self._records.next_number, version_counter(tenant, name)),
            ref=AdapterRef(checked.digest, config_blob, weights_blob, checked.weights_bytes),
            max_rank=checked.max_rank,
            target_modules=tuple(checked.target_modules),
            num_parameters=checked.num_parameters,
            created_at=int(await asyncio.to_thread(self._records.now)),
            base_fingerprint="" if info is None else info.base_fingerprint,
        )
        while True:
            changes = publication(await self._record(tenant, name), tenant, name, version)
            try:
                record, *_ = await asyncio.to_thread(self._records.apply, changes)
            except StaleRecord:
                continue
            return Adapter.from_record(record)

    def _put_config(self, config: BinaryIO) -> str:
        data = config.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise InvalidRequest(
                f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes; it holds settings, not weights.",
                param=CONFIG_FILE,
            )
        return self._blobs.put([data])

    def _tenant_folder(self, tenant: str) -> Path:
        if self._adapter_root is None:
            raise Forbidden(
                "This server loads no adapters from its disk; start it with --adapter-root, or upload the "
                "adapter with POST /v1/adapters."
            )
        if tenant in (".", "..") or "/" in tenant:
            raise Forbidden(f"The tenant's name '{tenant}' cannot be a folder's; rename the tenant.")
        return self._adapter_root / tenant

    async def _record(self, tenant: str, name: str) -> Record | None:
        return await asyncio.to_thread(self._records.get, ADAPTER_KIND, tenant, name)

    def _tar(self, name: str, version: AdapterVersion) -> Download:
        parts = []
        num_bytes = 2 * _TAR_BLOCK
        for filename, blob in zip((CONFIG_FILE, WEIGHTS_FILE), version.blobs, strict=True):
            try:
                size = self._blobs.size(blob)
            except BlobMissing:
                raise Internal(
                    "The adapter's stored bytes are missing or damaged; upload it again."
                ) from None
            header = tarfile.TarInfo(filename)
            header.size, header.mtime, header.mode = size, version.created_at, 0o644
            encoded = header.tobuf(tarfile.PAX_FORMAT)
            padding = -size % _TAR_BLOCK
            num_bytes += len(encoded) + size + padding
            parts.append((encoded, open_blob(self._blobs, blob), bytes(padding)))

        def chunks() -> Iterator[bytes]:
            for encoded, content, padding in parts:
                yield encoded
                yield from content
                yield padding
            yield bytes(2 * _TAR_BLOCK)

        return Download(f"{name}@{version.number}.tar", num_bytes, chunks())

    def _sweep_retired(self) -> None:
        now = self._records.now()
        for record in self._records.list(RETIRED_KIND, None):
            if record.value["until"] <= now:
                try:
                    self._records.apply(expiry(record))
                except StaleRecord:
                    continue


def _bytes_gone() -> Internal:
    return Internal("The adapter's stored bytes are missing or damaged; upload it again.")


def _version(adapter: Adapter, number: int | None, model: str) -> AdapterVersion:
    if number is None:
        return adapter.newest
    for version in adapter.versions:
        if version.number == number:
            return version
    raise model_not_found(model)


def _open_peft_directory(folder: Path, path: str) -> tuple[BinaryIO, BinaryIO]:
    """The two files of the PEFT directory at `path` (relative to `folder`, or absolute below it)."""
    try:
        root = folder.resolve(strict=True)
    except OSError:
        raise NotFound(
            "This tenant has no folder below the adapter root; the operator creates it.", param="lora_path"
        ) from None
    with ExitStack() as stack:
        files = [stack.enter_context(_open_below(root, path, name)) for name in (CONFIG_FILE, WEIGHTS_FILE)]
        stack.pop_all()
    return files[0], files[1]


def _open_below(root: Path, path: str, name: str) -> BinaryIO:
    """Open the regular file `root/path/name` after following links, provided it is below `root`."""
    try:
        file = (root / path / name).resolve()
        if not file.is_relative_to(root):
            raise Forbidden(
                f"lora_path '{path}' is not below this tenant's folder of the adapter root.",
                param="lora_path",
            )
        if not file.is_file():
            raise FileNotFoundError
        return os.fdopen(os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb")
    except (OSError, ValueError, RuntimeError):
        raise NotFound(f"lora_path '{path}' holds no readable {name}.", param="lora_path") from None
