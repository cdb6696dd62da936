"""The host cache: a property test against a model, and what pins mean."""

from __future__ import annotations

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


def test_an_image_larger_than_the_cache_is_not_kept_and_evicts_nothing():
    cache = HostCache(50)
    cache.put(_image("a", 50))
    assert not cache.put(_image("b", 51))
    assert "a" in cache


OPERATIONS = st.lists(st.tuples(st.sampled_from(["put", "get"]), st.sampled_from("abcdef")), max_size=40)


@given(OPERATIONS, st.integers(1, 120))
def test_the_cache_never_exceeds_its_size(operations, max_bytes):
    cache = HostCache(max_bytes)
    for operation, name in operations:
        if operation == "put":
            assert cache.put(_image(name, 10 + ord(name) % 30)) == (name in cache)
        else:
            assert (cache.try_get(name) is not None) == (name in cache)
        assert cache.num_bytes == sum(10 + ord(n) % 30 for n in "abcdef" if n in cache) <= max_bytes
