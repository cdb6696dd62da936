"""The host cache: a property test against a model, and what pins mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft_server.adapters.host_cache import HostCache
from weft_server.adapters.image import HostImage


def _image(digest: str, nbytes: int) -> HostImage:
    return HostImage(digest, torch.zeros(nbytes, dtype=torch.uint8), ())


def test_the_least_recently_used_image_goes_first():
    cache = HostCache(100)
    for name in "abc":
        assert cache.put(_image(name, 30))
    assert cache.try_get("a") is not None
    assert cache.put(_image("d", 30))
    assert [name in cache for name in "abcd"] == [True, False, True, True]
    assert cache.num_bytes == 90


def test_a_pinned_image_stays_until_every_pin_is_undone():
    cache = HostCache(60)
    cache.put(_image("a", 40))
    cache.pin("a")
    cache.pin("a")
    assert not cache.put(_image("b", 40))
    cache.unpin("a")
    assert not cache.put(_image("b", 40))
    cache.unpin("a")
    assert cache.put(_image("b", 40))
    assert "a" not in cache
    with pytest.raises(KeyError, match="not pinned"):
        cache.unpin("a")
    with pytest.raises(KeyError, match="not in the host cache"):
        cache.pin("a")


def test_an_image_larger_than_the_cache_is_not_kept_and_evicts_nothing():
    cache = HostCache(50)
    cache.put(_image("a", 50))
    assert not cache.put(_image("b", 51))
    assert "a" in cache


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["put", "get", "pin", "unpin"]), st.sampled_from("abcdef")), max_size=40
)


@given(OPERATIONS, st.integers(1, 120))
def test_the_cache_never_exceeds_its_size_nor_loses_a_pinned_image(operations, max_bytes):
    cache, pins = HostCache(max_bytes), dict.fromkeys("abcdef", 0)
    for operation, name in operations:
        if operation == "put":
            assert cache.put(_image(name, 10 + ord(name) % 30)) == (name in cache)
        elif operation == "get":
            assert (cache.try_get(name) is not None) == (name in cache)
        elif operation == "pin" and name in cache:
            cache.pin(name)
            pins[name] += 1
        elif operation == "unpin" and pins[name]:
            cache.unpin(name)
            pins[name] -= 1
        assert cache.num_bytes == sum(10 + ord(n) % 30 for n in "abcdef" if n in cache) <= max_bytes
        assert all(n in cache for n, count in pins.items() if count)
