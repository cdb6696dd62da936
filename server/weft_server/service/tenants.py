"""Tenants and their API keys: who is calling.

Owns the keys file (TOML) and its reload. Keys are 256-bit random, so a plain SHA-256 is enough at rest. Knows
nothing of HTTP beyond the `Authorization` value it is handed.

    [[tenants]]
    name = "acme"
    weight = 2.0
    keys = ["sha256:9f86d0…"]
    admin = false
    max_concurrency = 16
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft_server.errors import ConfigError, Unauthenticated

DEFAULT_TENANT_NAME = "default"
KEY_PREFIX = "weft-"
MAX_CONCURRENCY = 1_000_000

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ALLOWED = ("name", "weight", "keys", "admin", "max_concurrency")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose objects a request sees.

    `weight` is its share under contention, relative to the other tenants'; at most `max_concurrency` of its
    choices are computed at a time.
    """

    name: str
    weight: float = 1.0
    is_admin: bool = False
    max_concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A fresh key, shown once, and what the keys file stores of it."""

    secret: str
    digest: str


def new_key() -> NewKey:
    """Draw a key of 256 random bits."""
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    return NewKey(secret, key_digest(secret))


def key_digest(secret: str) -> str:
    """`sha256:<hex>` of a key, as the keys file holds it."""
    return "sha256:" + hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


class TenantRegistry:
    """Maps keys to tenants.

    Without a keys file there is one tenant, `default`, who needs no key and is admin.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Read the keys file.

        Raises:
            ConfigError: the file is unreadable or invalid; the message names the entry.
        """
        self._path = path
        self._by_digest: dict[str, Tenant] = {}
        self._tenants: tuple[Tenant, ...] = (Tenant(DEFAULT_TENANT_NAME, is_admin=True),)
        if path is not None:
            self._by_digest, self._tenants = read_keys_file(path)

    @property
    def tenants(self) -> tuple[Tenant, ...]:
        """The configured tenants, in the file's order."""
        return self._tenants

    @property
    def weights(self) -> dict[str, float]:
        """Weights by tenant."""
        return {tenant.name: tenant.weight for tenant in self._tenants}

    @property
    def max_concurrency(self) -> dict[str, int]:
        """The concurrency of the tenants that have a limit."""
        return {
            tenant.name: tenant.max_concurrency
            for tenant in self._tenants
            if tenant.max_concurrency is not None
        }

    def share(self, name: str) -> float:
        """A tenant's weight over those of all tenants; 0 for an unknown one."""
        weights = self.weights
        return weights.get(name, 0.0) / sum(weights.values())

    def authenticate(self, authorization: str | None) -> Tenant:
        """The tenant of an `Authorization: Bearer <key>` value.

        Raises:
            Unauthenticated: keys are configured, and this is none of them.
        """
        if self._path is None:
            return self._tenants[0]
        if not authorization:
            raise Unauthenticated(
                "No API key given. Send the header 'Authorization: Bearer <key>'.", code="missing_api_key"
            )
        scheme, _, secret = authorization.partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise Unauthenticated("The Authorization header must be 'Bearer <key>'.")
        tenant = self._find(key_digest(secret.strip()))
        if tenant is None:
            raise Unauthenticated("Incorrect API key. Ask the operator for a key of your tenant.")
        return tenant

    def reload(self) -> bool:
        """Read the keys file again.

        A bad file is logged and changes nothing. Returns whether it was taken over.
        """
        if self._path is None:
            return False
        try:
            self._by_digest, self._tenants = read_keys_file(self._path)
        except ConfigError as error:
            logger.error("keeping the previous API keys: %s", error.message)
            return False
        logger.info("reloaded API keys: %d tenants, %d keys", len(self._tenants), len(self._by_digest))
        return True

    def _find(self, digest: str) -> Tenant | None:
        """Compare with every key, so that the time taken tells nothing about the nearest one."""
        found: Tenant | None = None
        for known, tenant in self._by_digest.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


def read_keys_file(path: Path) -> tuple[dict[str, Tenant], tuple[Tenant, ...]]:
    """Parse a keys file into (key digest → tenant, tenants).

    Raises:
        ConfigError: naming the file, the entry, the value and what is allowed.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--api-keys {path}: cannot be read: {error.strerror or error}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-keys {path}: not valid TOML: {error}.") from None
    for key in document:
        if key != "tenants":
            raise ConfigError(f"--api-keys {path}: unknown key '{key}'; allowed: [[tenants]] tables.")
    entries = document.get("tenants")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"--api-keys {path}: needs at least one [[tenants]] table.")
    by_digest: dict[str, Tenant] = {}
    tenants: dict[str, Tenant] = {}
    for idx, entry in enumerate(entries):
        where = f"--api-keys {path}: tenants[{idx}]"
        tenant, digests = _read_entry(where, entry)
        if tenant.name in tenants:
            raise ConfigError(f"{where}: the tenant '{tenant.name}' is defined twice.")
        tenants[tenant.name] = tenant
        for digest in digests:
            if digest in by_digest:
                raise ConfigError(
                    f"{where}: the key {digest[:15]}… belongs to '{by_digest[digest].name}' too."
                )
            by_digest[digest] = tenant
    return by_digest, tuple(tenants.values())


def check_tenant_name(where: str, name: object) -> str:
    """The name, if it is one. Raises ConfigError naming `where`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: {name!r} is not a name; allowed: [A-Za-z0-9._-], 1 to 64 characters.")
    return name


def _read_entry(where: str, entry: Mapping[str, Any]) -> tuple[Tenant, list[str]]:
    for key in entry:
        if key not in _ALLOWED:
            raise ConfigError(f"{where}: unknown key '{key}'; allowed: {', '.join(_ALLOWED)}.")
    name, weight = entry.get("name"), entry.get("weight", 1.0)
    keys, admin = entry.get("keys"), entry.get("admin", False)
    tenant_name = check_tenant_name(f"{where}.name", name)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= 1e6:
        raise ConfigError(f"{where}.weight: {weight!r} is not allowed; a number above 0, at most 1e6.")
    concurrency = entry.get("max_concurrency")
    is_whole = isinstance(concurrency, int) and not isinstance(concurrency, bool)
    if concurrency is not None and not (is_whole and 1 <= concurrency <= MAX_CONCURRENCY):
        raise ConfigError(
            f"{where}.max_concurrency: {concurrency!r} is not allowed; a whole number from 1 to "
            f"{MAX_CONCURRENCY}, or leave it out."
        )
    if not isinstance(admin, bool):
        raise ConfigError(f"{where}.admin: {admin!r} is not allowed; true or false.")
    if not isinstance(keys, list) or not keys:
        raise ConfigError(
            f"{where}.keys: needs a list of at least one 'sha256:…' (`weft keys new` makes one)."
        )
    for key in keys:
        if not isinstance(key, str) or not _KEY_DIGEST.fullmatch(key):
            raise ConfigError(
                f"{where}.keys: an entry is not 'sha256:' and 64 lower-case hex digits; the file holds "
                "digests, not keys (`weft keys new` prints both)."
            )
    return Tenant(tenant_name, float(weight), admin, concurrency), keys
