"""Precedence, validation and messages of the configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from weft_server.config import OPTIONS, Settings, is_loopback, load_settings
from weft_server.errors import ConfigError


def load(
    flags: dict[str, Any] | None = None, *, env: dict[str, str] | None = None, config: Path | None = None
) -> Settings:
    return load_settings(
        {"model": "demo", **(flags or {})}, environ=env or {}, config=None if config is None else str(config)
    )


def test_every_option_is_a_setting_and_the_other_way_round() -> None:
    assert [option.name for option in OPTIONS] == [field.name for field in dataclasses.fields(Settings)]


def test_the_defaults_are_the_documented_ones() -> None:
    settings = load()
    assert (settings.host, settings.port, settings.store) == ("127.0.0.1", 8000, "sqlite")
    assert (settings.device, settings.dtype, settings.quantization) == ("auto", "auto", "auto")
    assert (settings.gpu_memory_utilization, settings.slo_percentile) == (0.9, 95.0)
    assert (settings.max_upload_mb, settings.log_level) == (512, "info")
    assert settings.max_model_len is settings.kv_cache_tokens is settings.tpot_slo_ms is None
    assert settings.data_dir.name == "weft"
    switches = [settings.no_auth, settings.low_memory, settings.redis_volatile, settings.no_prefix_cache]
    assert [*switches, settings.enforce_eager] == [False] * 5


def test_flag_beats_variable_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "weft.toml"
    file.write_text("port = 1001\nmax-num-seqs = 5\nmax_model_len = 77\nlow_memory = true\n")
    env = {"WEFT_PORT": "1002", "WEFT_MAX_NUM_SEQS": "6"}
    settings = load({"port": "1003"}, env=env, config=file)
    assert (settings.port, settings.max_num_seqs, settings.max_model_len) == (1003, 6, 77)
    assert settings.low_memory is True
    assert load(env={**env, "WEFT_CONFIG": str(file)}).max_model_len == 77


def test_the_model_may_come_from_anywhere_but_must_come() -> None:
    assert load_settings({}, environ={"WEFT_MODEL": "some/model"}).model == "some/model"
    with pytest.raises(ConfigError, match="No model given"):
        load_settings({}, environ={})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("port", "x", "0 to 65535"),
        ("port", "65536", "0 to 65535"),
        ("port", "-1", "0 to 65535"),
        ("port", "80.5", "0 to 65535"),
        ("device", "tpu", "auto, cpu, cuda"),
        ("dtype", "bf16", "bfloat16"),
        ("quantization", "awq", "nf4"),
        ("store", "postgres://x", "redis://"),
        ("store", "redis://", "redis://"),
        ("max_model_len", "0", "1 to 2147483647"),
        ("kv_cache_tokens", "100000000000", "1 to 2147483647"),
        ("max_num_seqs", "2000000000", "1 to 65536"),
        ("gpu_memory_utilization", "1.5", "at most 1"),
        ("gpu_memory_utilization", "0", "above 0"),
        ("gpu_memory_utilization", "nan", "above 0"),
        ("tpot_slo_ms", "-3", "above 0"),
        ("tpot_slo_ms", "inf", "above 0"),
        ("slo_percentile", "101", "at most 100"),
        ("log_level", "loud", "debug, info"),
        ("served_model_name", "a b", "1 to 128"),
        ("api_keys", "/no/such/file", "existing"),
        ("chat_template", "/no/such/file", "existing"),
        ("adapter_root", "/no/such/folder", "existing"),
        ("max_upload_mb", "0", "1 to"),
        ("host", "", "address"),
    ],
)
def test_a_bad_value_names_key_value_and_what_is_allowed(name: str, value: str, allowed: str) -> None:
    flag = "--" + name.replace("_", "-")
    for where, given in (
        (flag, {"flags": {name: value}}),
        (f"WEFT_{name.upper()}", {"env": {f"WEFT_{name.upper()}": value}}),
    ):
        if value == "" and "env" in given:
            continue
        with pytest.raises(ConfigError) as caught:
            load(**given)  # type: ignore[arg-type]
        assert caught.value.message.startswith(f"{where}: {value!r}")
        assert allowed in caught.value.message


def test_unknown_keys_are_refused_everywhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"WEFT_PROT='1'.*WEFT_PORT"):
        load(env={"WEFT_PROT": "1"})
    file = tmp_path / "weft.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(ConfigError, match=r"unknown key 'prot'.*port"):
        load(config=file)
    file.write_text("max-num-seqs = 1\nmax_num_seqs = 1\n")
    with pytest.raises(ConfigError, match="given twice"):
        load(config=file)


def test_values_of_the_file_have_types(tmp_path: Path) -> None:
    file = tmp_path / "weft.toml"
    for line in ("port = true", "low_memory = 1", "host = 5", "gpu_memory_utilization = [1]", "device = 1"):
        file.write_text(line)
        with pytest.raises(ConfigError, match="is not allowed"):
            load(config=file)


@pytest.mark.parametrize("text", ["port = ", None])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "weft.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match="--config"):
        load(config=file)


def test_foreign_and_empty_variables_are_ignored() -> None:
    env = {
        "WEFT_TEST_DATA": "/x",
        "WEFT_API_KEY": "k",
        "WEFT_PORT": "",
        "WEFT_SERVICE_HOST": "10.0.0.1",
        "WEFT_SERVICE_PORT_HTTP": "80",
        "WEFT_PORT_8000_TCP_ADDR": "10.0.0.1",
        "WEFT_GRAFANA_SERVICE_HOST": "10.0.0.2",
        "PATH": "/bin",
    }
    assert load(env=env).port == 8000


def test_a_port_that_kubernetes_injected_is_explained() -> None:
    with pytest.raises(ConfigError, match="enableServiceLinks"):
        load(env={"WEFT_PORT": "tcp://10.0.0.1:8000"})


@pytest.mark.parametrize("value", ["true", "1", "yes", "on", "TRUE"])
def test_switches_are_written_in_words(value: str) -> None:
    assert load(env={"WEFT_NO_AUTH": value}).no_auth is True


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_listening_beyond_loopback_needs_keys_or_no_auth(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--no-auth"):
        load({"host": host})
    assert load({"host": host, "no_auth": True}).host == host
    keys = tmp_path / "keys.toml"
    keys.write_text("")
    assert load({"host": host, "api_keys": str(keys)}).api_keys == keys
    with pytest.raises(ConfigError, match="contradict"):
        load({"host": host, "api_keys": str(keys), "no_auth": True})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert is_loopback(host)
    assert load({"host": host}).host == host


def test_volatile_redis_without_redis_is_refused() -> None:
    with pytest.raises(ConfigError, match="--store redis"):
        load({"redis_volatile": True})
    assert load({"redis_volatile": True, "store": "redis://localhost:6379/0"}).redis_volatile
