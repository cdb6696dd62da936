"""Which graphs there are."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft_server.engine.graph_shapes import MAX_STEP, VARIANTS, GraphVariant, graph_keys, row_buckets


@given(max_rows=st.integers(1, 5000))
def test_buckets_reach_the_largest_batch_and_pad_little(max_rows: int) -> None:
    buckets = row_buckets(max_rows)
    assert buckets[0] == 1
    assert buckets[-1] == max_rows
    for small, large in pairwise(buckets):
        assert small < large <= 2 * small
        assert large - small <= MAX_STEP
        assert small < 64 or large <= 1.25 * small


@given(max_rows=st.integers(1, 3000), max_num_seqs=st.integers(1, 3000))
def test_every_batch_of_decode_rows_has_graphs_of_its_own_and_no_more_rows_do(
    max_rows: int, max_num_seqs: int
) -> None:
    buckets = row_buckets(max_rows)
    keys = graph_keys(buckets, max_num_seqs)
    assert len(set(keys)) == len(keys)
    most_decode = min(max_rows, max_num_seqs)
    decode_rows = {key.num_rows for key in keys if not key.variant.has_chunks}
    assert min(b for b in buckets if b >= most_decode) == max(decode_rows)
    assert {key.num_rows for key in keys if key.variant.has_chunks} == set(buckets)


def test_the_largest_graphs_of_a_variant_are_captured_first() -> None:
    keys = graph_keys(row_buckets(512), 256)
    for variant in VARIANTS:
        rows = [key.num_rows for key in keys if key.variant == variant]
        assert rows == sorted(rows, reverse=True)


@pytest.mark.parametrize("rank", [0, 1, 16, 17, 64, 256])
@pytest.mark.parametrize("has_chunks", [False, True])
@pytest.mark.parametrize("has_dropout", [False, True])
def test_some_variant_covers_every_batch(rank: int, has_chunks: bool, has_dropout: bool) -> None:
    needed = GraphVariant(has_chunks, rank, has_dropout and rank > 0)
    covering = [variant for variant in VARIANTS if variant.covers(needed)]
    assert covering
    assert all(variant.max_rank >= rank and variant.has_chunks >= has_chunks for variant in covering)
    assert all(variant.has_dropout >= needed.has_dropout for variant in covering)
