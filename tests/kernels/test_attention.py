"""Paged attention of decode rows against plain attention of one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weft_kernels.attention import (
    AttentionBatch,
    chunk_vjp,
    gather_keys,
    make_buckets,
    make_chunk,
    paged_attention,
)
from weft_kernels.attention.decode import group_by_length

BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, SCALE = 4, 4, 2, 8, 0.3
CPU = torch.device("cpu")

MIXED = (3, 700, 5, 64, 1, 300, 63, 8, 699)


def block_tables(lengths: Sequence[int]) -> list[list[int]]:
    """Disjoint blocks in a shuffled order; block 0 belongs to nobody."""
    num_blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    shuffled = torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(5)).tolist()
    tables, first = [], 0
    for count in num_blocks:
        tables.append([1 + block for block in shuffled[first : first + count]])
        first += count
    return tables


def filled_cache(tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Random keys and values where the sequences have written, NaN in every other place of the cache."""
    generator = torch.Generator().manual_seed(6)
    shape = (2 + sum(map(len, tables)), BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    caches = []
    for _ in range(2):
        cache = torch.full(shape, torch.nan, dtype=torch.float64)
        for table, length in zip(tables, lengths, strict=True):
            for position in range(length):
                row = torch.randn(shape[2:], generator=generator, dtype=torch.float64)
                cache[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = row
        caches.append(cache)
    return caches[0], caches[1]


def attend_alone(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Sequence[int], length: int, window: int | None
) -> Tensor:
    """The definition, for one row."""
    first = 0 if window is None else max(0, length - window)
    k = k_cache[list(table)].flatten(0, 1)[first:length].repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1)
    v = v_cache[list(table)].flatten(0, 1)[first:length].repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1)
    weights = torch.einsum("hd,khd->hk", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("hk,khd->hd", weights, v)


@pytest.mark.parametrize("window", [None, 6, 300])
@pytest.mark.parametrize("max_keys", [1, 500, 1 << 16])
@pytest.mark.parametrize("lengths", [MIXED, (9,), (16, 16, 16), (7, 9, 8)])
def test_decode_rows_of_any_lengths_equal_each_sequence_alone_beside_nan(
    lengths: tuple[int, ...], max_keys: int, window: int | None
) -> None:
    tables = block_tables(lengths)
    k_cache, v_cache = filled_cache(tables, lengths)
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(len(lengths), NUM_HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    batch = AttentionBatch(make_buckets(tables, lengths, CPU, max_keys=max_keys), ())
    out = paged_attention(q, k_cache, v_cache, batch, scale=SCALE, sliding_window=window)
    alone = [
        attend_alone(q[i], k_cache, v_cache, table, length, window)
        for i, (table, length) in enumerate(zip(tables, lengths, strict=True))
    ]
    torch.testing.assert_close(out, torch.stack(alone), atol=1e-12, rtol=1e-12)


def test_one_long_sequence_does_not_make_short_ones_read_its_length() -> None:
    lengths = [64] * 31 + [4096]
    buckets = make_buckets(block_tables(lengths), lengths, CPU, max_keys=1 << 16)
    assert sum(bucket.num_rows * bucket.num_keys for bucket in buckets) == sum(lengths)
    assert len(buckets) == 2


def test_short_sequences_of_unequal_length_are_one_call() -> None:
    assert len(group_by_length([60, 25, 64, 40, 33, 50], max_keys=1 << 16)) == 1


@given(
    lengths=st.lists(st.integers(1, 5000), max_size=64),
    max_keys=st.sampled_from([1, 3000, 20_000, 1 << 30]),
)
def test_groups_hold_every_row_once_and_pad_at_most_twofold(lengths: list[int], max_keys: int) -> None:
    groups = group_by_length(lengths, max_keys=max_keys)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[row] for row in group)
        assert padded <= 2 * sum(lengths[row] for row in group) + 128
        assert len(group) == 1 or padded <= max_keys
    if max_keys == 1 << 30:
        assert len(groups) <= 13


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("first_key", "start", "end"), [(0, 0, 11), (0, 7, 30), (5, 5, 6), (13, 17, 30)])
def test_a_chunk_reads_nothing_beyond_its_own_keys(
    first_key: int, start: int, end: int, window: int | None
) -> None:
    """Keys outside `[first_key, end)` of the sequence are NaN too, in the same blocks."""
    (table,) = block_tables([30])
    k_cache, v_cache = filled_cache([table], [30])
    for position in (*range(first_key), *range(end, 30)):
        for cache in (k_cache, v_cache):
            cache[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = torch.nan
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(end - start, NUM_HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    chunk = make_chunk(0, end - start, first_key, end, torch.tensor(table), BLOCK_SIZE)
    out = paged_attention(
        q, k_cache, v_cache, AttentionBatch((), [chunk]), scale=SCALE, sliding_window=window
    )
    assert out.isfinite().all()
    k, v = gather_keys(k_cache, v_cache, chunk)
    again, vjp = chunk_vjp(q, k, v, chunk, scale=SCALE, sliding_window=window)
    torch.testing.assert_close(again, out)
    assert all(gradient.isfinite().all() for gradient in vjp(torch.ones_like(out)))
