"""The keys file and who a key belongs to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from weft_server.errors import ConfigError, Unauthenticated
from weft_server.service.tenants import TenantRegistry, new_key

DIGEST = "sha256:" + "0" * 64


def registry(tmp_path: Path, text: str) -> TenantRegistry:
    path = tmp_path / "keys.toml"
    path.write_text(text, encoding="utf-8")
    return TenantRegistry(path)


def test_without_a_file_everyone_is_the_default_tenant() -> None:
    tenants = TenantRegistry()
    for header in (None, "Bearer anything"):
        tenant = tenants.authenticate(header)
        assert (tenant.name, tenant.is_admin) == ("default", True)
    assert tenants.reload() is False


def test_a_key_is_random_and_only_its_digest_is_stored() -> None:
    first, second = new_key(), new_key()
    assert first.secret != second.secret
    assert len(first.secret) >= 48
    assert first.digest == "sha256:" + hashlib.sha256(first.secret.encode()).hexdigest()


def test_a_tenant_may_have_several_keys(tmp_path: Path) -> None:
    one, two = new_key(), new_key()
    tenants = registry(
        tmp_path, f'[[tenants]]\nname = "acme"\nweight = 2.5\nkeys = ["{one.digest}", "{two.digest}"]\n'
    )
    for key in (one, two):
        tenant = tenants.authenticate(f"Bearer {key.secret}")
        assert (tenant.name, tenant.weight, tenant.is_admin) == ("acme", 2.5, False)
    with pytest.raises(Unauthenticated):
        tenants.authenticate(f"Bearer {new_key().secret}")


def test_a_key_that_is_not_unicode_is_only_wrong(tmp_path: Path) -> None:
    tenants = registry(tmp_path, f'[[tenants]]\nname = "acme"\nkeys = ["{DIGEST}"]\n')
    with pytest.raises(Unauthenticated):
        tenants.authenticate("Bearer \udcff\udcfe")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one"),
        ("tenants = []", "at least one"),
        ("tenants = 3", "at least one"),
        ("nonsense", "not valid TOML"),
        ('x = 1\n[[tenants]]\nname = "a"', "unknown key 'x'"),
        (f'[[tenants]]\nname = "a b"\nkeys = ["{DIGEST}"]', r"tenants\[0\]\.name: 'a b'"),
        (f'[[tenants]]\nkeys = ["{DIGEST}"]', r"tenants\[0\]\.name: None"),
        (f'[[tenants]]\nname = "a"\nweight = 0\nkeys = ["{DIGEST}"]', r"weight: 0"),
        (f'[[tenants]]\nname = "a"\nweight = true\nkeys = ["{DIGEST}"]', r"weight: True"),
        (f'[[tenants]]\nname = "a"\nmax_concurrency = 0\nkeys = ["{DIGEST}"]', r"max_concurrency: 0 is not"),
        (f'[[tenants]]\nname = "a"\nmax_concurrency = true\nkeys = ["{DIGEST}"]', r"max_concurrency: True"),
        (f'[[tenants]]\nname = "a"\nmax_concurrency = 1.5\nkeys = ["{DIGEST}"]', r"max_concurrency: 1.5"),
        (f'[[tenants]]\nname = "a"\nadmin = "yes"\nkeys = ["{DIGEST}"]', r"admin: 'yes'"),
        (f'[[tenants]]\nname = "a"\nrole = "x"\nkeys = ["{DIGEST}"]', "unknown key 'role'"),
        ('[[tenants]]\nname = "a"', "at least one 'sha256"),
        ('[[tenants]]\nname = "a"\nkeys = ["weft-plain"]', "digests, not keys"),
        (f'[[tenants]]\nname = "a"\nkeys = ["{DIGEST}", "{DIGEST}"]', "belongs to 'a' too"),
        (f'[[tenants]]\nname = "a"\nkeys = ["{DIGEST}"]\n' * 2, "defined twice"),
    ],
)
def test_a_bad_file_is_refused_naming_the_entry(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry(tmp_path, text)


def test_a_plain_key_in_the_file_is_not_repeated_in_the_error(tmp_path: Path) -> None:
    secret = new_key().secret
    with pytest.raises(ConfigError) as caught:
        registry(tmp_path, f'[[tenants]]\nname = "a"\nkeys = ["{secret}"]')
    assert secret not in caught.value.message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        TenantRegistry(tmp_path / "none.toml")


def test_reloading_takes_over_a_good_file_and_keeps_the_old_for_a_bad_one(tmp_path: Path) -> None:
    old, new = new_key(), new_key()
    tenants = registry(tmp_path, f'[[tenants]]\nname = "a"\nkeys = ["{old.digest}"]')
    (tmp_path / "keys.toml").write_text("broken")
    assert tenants.reload() is False
    assert tenants.authenticate(f"Bearer {old.secret}").name == "a"
    (tmp_path / "keys.toml").write_text(f'[[tenants]]\nname = "b"\nkeys = ["{new.digest}"]')
    assert tenants.reload() is True
    assert tenants.authenticate(f"Bearer {new.secret}").name == "b"
    with pytest.raises(Unauthenticated):
        tenants.authenticate(f"Bearer {old.secret}")
    assert [tenant.name for tenant in tenants.tenants] == ["b"]
