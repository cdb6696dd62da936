"""The prefix cache's names: equal exactly where tenant, adapter and all tokens up to there are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft_scheduler import prefix_root
from weft_scheduler.prefix import PrefixChain, PrefixIndex

TOKENS = st.lists(st.integers(0, 2), max_size=9)


def hashes(
    tokens: list[int], tenant: str = "t", adapter: str | None = None, block_size: int = 2
) -> list[bytes]:
    return PrefixChain(prefix_root(tenant, adapter), block_size, tokens).hashes


@given(first=TOKENS, second=TOKENS)
def test_two_blocks_have_one_name_exactly_if_everything_up_to_their_end_is_equal(
    first: list[int], second: list[int]
) -> None:
    for idx, (one, other) in enumerate(zip(hashes(first), hashes(second), strict=False)):
        end = 2 * (idx + 1)
        assert (one == other) == (first[:end] == second[:end])


def test_only_full_blocks_have_a_name_and_tokens_may_come_one_by_one() -> None:
    chain = PrefixChain(prefix_root("t", None), 3, [5, 6])
    assert chain.hashes == []
    for token_id in (7, 8, 9, 10, 11):
        chain.append(token_id)
    assert chain.hashes == hashes([5, 6, 7, 8, 9, 10], block_size=3)


def test_tenants_adapters_and_versions_have_chains_of_their_own() -> None:
    owners = [(t, a) for t in ("t", "u", "tbase", "") for a in (None, "", "digest-1", "digest-2", "base")]
    assert len({prefix_root(*owner) for owner in owners}) == len(owners)
    assert len({hashes([1, 2, 3, 4], *owner)[1] for owner in owners}) == len(owners)


def test_a_match_is_the_longest_beginning_that_is_known() -> None:
    index = PrefixIndex()
    names = hashes([1, 2, 3, 4, 5, 6])
    chain = PrefixChain(prefix_root("t", None), 2, [1, 2, 3, 4, 5, 6])
    assert index.add(7, names[0])
    assert index.add(9, names[2])
    assert index.match(chain, 3) == [7]
    assert index.add(8, names[1])
    assert index.match(chain, 3) == [7, 8, 9]
    assert index.match(chain, 2) == [7, 8]
    index.forget(7)
    assert index.match(chain, 3) == []
    assert index.block(names[1]) == 8
    index.check_invariants()


def test_contents_that_are_known_twice_keep_the_first_block() -> None:
    index = PrefixIndex()
    (name,), (other,) = hashes([1, 2]), hashes([3, 4])
    assert index.add(1, name)
    assert not index.add(2, name)
    assert (index.block(name), 2 in index, len(index)) == (1, False, 1)
    with pytest.raises(ValueError, match="block 1 is named already"):
        index.add(1, other)


def test_what_is_being_computed_belongs_to_the_first_that_began() -> None:
    index = PrefixIndex()
    index.begin("a", [b"x", b"y"])
    index.begin("b", [b"y", b"z"])
    assert index.computing == {b"x": "a", b"y": "a", b"z": "b"}
    index.end("b", [b"y", b"z"])
    assert index.computing == {b"x": "a", b"y": "a"}
    index.end("a", [b"x", b"y"])
    assert index.computing == {}
