"""Adapter records: a name, its immutable versions, and the store changes that publish or delete them.

Owns the record kinds `adapter` and `retired`, the counter that numbers versions and the blob links
`adapter:{tenant}:{name}@{version}`. Values and changes only: whoever applies them decides what else is in
the same change. Version numbers come from a counter that outlives the record, so none is ever used twice.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weft_server.errors import Conflict, Unprocessable
from weft_server.protocol import AdapterRef
from weft_server.store.base import Change, Create, Delete, Link, Record, Unlink, Update

ADAPTER_KIND = "adapter"
RETIRED_KIND = "retired"
RETIRED_GRACE_S = 3600.0
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version. `job_id` is the job that trained it, None for an upload."""

    number: int
    ref: AdapterRef
    max_rank: int
    target_modules: tuple[str, ...]
    num_parameters: int
    created_at: int
    base_fingerprint: str
    job_id: str | None = None

    def to_value(self) -> dict[str, Any]:
        """As stored under its number."""
        return {
            "digest": self.ref.digest,
            "config_blob": self.ref.config_blob,
            "weights_blob": self.ref.weights_blob,
            "weights_bytes": self.ref.weights_bytes,
            "created_at": self.created_at,
            "max_rank": self.max_rank,
            "target_modules": list(self.target_modules),
            "num_parameters": self.num_parameters,
            "base_fingerprint": self.base_fingerprint,
            "job_id": self.job_id,
        }

    @classmethod
    def from_value(cls, number: int, value: Mapping[str, Any]) -> AdapterVersion:
        """From the record."""
        return cls(
            number=number,
            ref=AdapterRef(
                digest=value["digest"],
                config_blob=value["config_blob"],
                weights_blob=value["weights_blob"],
                weights_bytes=value["weights_bytes"],
            ),
            max_rank=value["max_rank"],
            target_modules=tuple(value["target_modules"]),
            num_parameters=value["num_parameters"],
            created_at=value["created_at"],
            base_fingerprint=value["base_fingerprint"],
            job_id=value["job_id"],
        )

    @property
    def blobs(self) -> tuple[str, str]:
        """The blobs that this version keeps."""
        return (self.ref.config_blob, self.ref.weights_blob)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A name and its versions, oldest first; requests for the bare name get the newest.

    `pinned` says that the newest is to stay on the device.
    """

    name: str
    versions: tuple[AdapterVersion, ...]
    created_at: int
    pinned: bool = False

    @property
    def newest(self) -> AdapterVersion:
        """The version that the bare name means."""
        return self.versions[-1]

    @classmethod
    def from_record(cls, record: Record) -> Adapter:
        """From the record."""
        numbered = sorted((int(number), value) for number, value in record.value["versions"].items())
        versions = tuple(AdapterVersion.from_value(number, value) for number, value in numbered)
        return cls(record.id, versions, record.value["created_at"], record.value.get("pinned", False))


def check_name(name: str, *, base_name: str, param: str) -> None:
    """Refuse what no adapter may be called.

    Raises:
        Unprocessable: the name does not match `[A-Za-z0-9._-]{1,64}`.
        Conflict: it is the base model's.
    """
    if not _NAME.fullmatch(name):
        raise Unprocessable(
            f"{param} is {name!r}; an adapter's name must be 1 to 64 of the characters A-Z a-z 0-9 . _ -",
            param=param,
        )
    if name == base_name:
        raise Conflict(f"'{name}' is the base model's name; choose another for the adapter.", param=param)


def version_counter(tenant: str, name: str) -> str:
    """The durable counter that numbers a name's versions."""
    return f"adapter:{tenant}:{name}"


def publication(current: Record | None, tenant: str, name: str, version: AdapterVersion) -> list[Change]:
    """The changes that add `version` to `name`: its record created or updated, its blobs linked."""
    numbered = {} if current is None else dict(current.value["versions"])
    numbered[str(version.number)] = version.to_value()
    value = {
        "name": name,
        "newest": max(map(int, numbered)),
        "versions": numbered,
        "created_at": version.created_at if current is None else current.value["created_at"],
        "pinned": current is not None and current.value.get("pinned", False),
    }
    record: Change = Create(ADAPTER_KIND, tenant, name, value) if current is None else Update(current, value)
    owner = _owner(tenant, name, version.number)
    return [record, *(Link(blob, owner) for blob in version.blobs)]


def pinning(current: Record, *, pinned: bool) -> list[Change]:
    """The changes that pin or unpin a name."""
    return [Update(current, {**current.value, "pinned": pinned})]


def removal(current: Record, *, now: float) -> list[Change]:
    """The changes that delete a name with all its versions.

    The blobs stay for `RETIRED_GRACE_S` more, held by a `retired` record, so that requests in flight finish
    on what they started with.
    """
    adapter = Adapter.from_record(current)
    retired_id = f"{current.id}-{secrets.token_hex(8)}"
    blobs = sorted({blob for version in adapter.versions for blob in version.blobs})
    value = {"blobs": blobs, "until": now + RETIRED_GRACE_S}
    changes: list[Change] = [Delete(current), Create(RETIRED_KIND, current.tenant, retired_id, value)]
    changes += [Link(blob, _retired_owner(current.tenant, retired_id)) for blob in blobs]
    for version in adapter.versions:
        owner = _owner(current.tenant, current.id, version.number)
        changes += [Unlink(blob, owner) for blob in version.blobs]
    return changes


def expiry(retired: Record) -> list[Change]:
    """The changes that let a deleted adapter's blobs go."""
    owner = _retired_owner(retired.tenant, retired.id)
    return [Delete(retired), *(Unlink(blob, owner) for blob in retired.value["blobs"])]


def _owner(tenant: str, name: str, number: int) -> str:
    return f"adapter:{tenant}:{name}@{number}"


def _retired_owner(tenant: str, retired_id: str) -> str:
    return f"retired:{tenant}:{retired_id}"
