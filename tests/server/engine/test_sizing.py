"""Sizes: what is given is honoured, or refused with what could be; the rest fits the free memory."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest

from weft_server.engine import sizing
from weft_server.engine.build import assemble_engine
from weft_server.engine.config import EngineConfig
from weft_server.engine.jobs import BlobIO
from weft_server.errors import ConfigError

MB = 1 << 20
FREE = 512 * MB


def _config(**given: Any) -> EngineConfig:
    return EngineConfig("tiny", "tiny", 1, "", "", "", "", "", device="cpu", dtype="float32", **given)


@pytest.fixture(autouse=True)
def free_memory():
    with mock.patch.object(sizing, "_usable_bytes", return_value=FREE):
        yield


def _bytes(weights, config: EngineConfig) -> tuple[int, int]:
    limits = sizing.choose_sizes(config, weights).limits
    per_token = 2 * 3 * 2 * 8 * 4
    return limits.capacity_tokens * per_token, limits.arena_elements * 4


def test_sizes_left_open_fit_the_free_memory(weights):
    assert sum(_bytes(weights, _config())) <= FREE


def test_what_the_first_backward_pass_will_take_is_left_free(weights):
    with mock.patch.object(type(weights), "deferred_bytes", FREE // 2):
        cache, arena = _bytes(weights, _config())
        assert cache + arena <= FREE // 2
        with pytest.raises(ConfigError, match="adapter-arena-mb"):
            sizing.choose_sizes(_config(adapter_arena_mb=FREE // 2 // MB + 1), weights)


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"adapter_arena_mb": 100_000_000}, "--adapter-arena-mb"),
        ({"kv_cache_tokens": 2_000_000_000}, "--kv-cache-tokens"),
        ({"kv_cache_tokens": 2_000_000_000, "adapter_arena_mb": 16}, "--kv-cache-tokens"),
        ({"kv_cache_tokens": 320, "adapter_arena_mb": 512}, "--adapter-arena-mb"),
    ],
)
def test_a_size_beyond_the_free_memory_is_refused_and_the_largest_allowed_one_is_not(weights, given, flag):
    key = flag[2:].replace("-", "_")
    with pytest.raises(ConfigError, match=f"{flag} is {given[key]}") as caught:
        sizing.choose_sizes(_config(**given), weights)
    allowed = int(re.search(r"Allowed: \d+ to (\d+)", caught.value.message)[1])
    assert sum(_bytes(weights, _config(**(given | {key: allowed})))) <= FREE
    with pytest.raises(ConfigError):
        sizing.choose_sizes(_config(**(given | {key: allowed + 32})), weights)


@pytest.mark.parametrize(
    ("part", "flag"), [("KvCache", "--kv-cache-tokens"), ("AdapterArena", "--adapter-arena-mb")]
)
def test_an_allocation_that_fails_all_the_same_names_the_size_to_lower(weights, part, flag):
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("can't allocate memory")

    with (
        mock.patch(f"weft_server.engine.build.{part}", fail),
        pytest.raises(ConfigError, match=f"give a smaller {flag}"),
    ):
        assemble_engine(_config(), weights, BlobIO(lambda _: b"", lambda _: ""), base_fingerprint="tiny")
