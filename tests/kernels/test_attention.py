"""Paged attention, forward and backward, against plain attention of one sequence at a time and its autograd.

Every place of the cache that no sequence has written holds NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from weft_kernels import attention
from weft_kernels.attention import (
    AttentionBatch,
    DecodeRow,
    KeyTarget,
    SavedAttention,
    fused,
    make_chunk,
    reference,
)
from weft_kernels.attention.tables import keys_per_part

CPU = torch.device("cpu")
SCALE = 0.3


@dataclass(frozen=True)
class Heads:
    """Query heads, key heads and head dimension of a model, and its cache's block size."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    block_size: int = 4


@dataclass(frozen=True)
class Implementation:
    """A module that computes attention, in a dtype, as exactly as `atol` says (of unit-sized results)."""

    ops: ModuleType
    dtype: torch.dtype
    atol: float
    device: torch.device = CPU


IMPLEMENTATIONS = {
    "reference-fp64": Implementation(reference, torch.float64, 1e-12),
    "reference-fp32": Implementation(reference, torch.float32, 5e-6),
    "reference-bf16": Implementation(reference, torch.bfloat16, 2e-2),
}
KERNELS = {
    "kernels-fp32": (torch.float32, 1e-5),
    "kernels-bf16": (torch.bfloat16, 2e-2),
    "kernels-fp16": (torch.float16, 3e-3),
}
KERNEL_PARAMETERS = [
    "kernels-fp32",
    pytest.param("kernels-bf16", marks=pytest.mark.gpu),
    pytest.param("kernels-fp16", marks=pytest.mark.gpu),
]


def windowed_attention(
    ops: ModuleType,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> tuple[Tensor, SavedAttention]:
    """The output, and what its backward needs."""
    stats = torch.full(q.shape[:2], torch.nan, dtype=torch.float32, device=q.device)
    out = ops.paged_attention(
        q, k_cache, v_cache, batch, scale=scale, sliding_window=sliding_window, stats=stats
    )
    return out, SavedAttention(q, k_cache, v_cache, batch, scale, sliding_window, out, stats)


def kernels(name: str, device: torch.device) -> Implementation:
    dtype, atol = KERNELS[name]
    return Implementation(fused, dtype, atol, device)


@pytest.fixture(params=[*IMPLEMENTATIONS, *KERNEL_PARAMETERS])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    if request.param in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[request.param]
    return kernels(request.param, request.getfixturevalue("device"))


@dataclass(frozen=True)
class Span:
    """`num_tokens` rows that end a sequence's keys `[first_key, end_key)`."""

    num_tokens: int
    first_key: int
    end_key: int


class Paged:
    """A cache that holds some sequences, in blocks of a shuffled order; block 0 belongs to nobody."""

    def __init__(self, heads: Heads, spans: Sequence[Span], dtype: torch.dtype, device: torch.device) -> None:
        self.heads, self.spans, self.device = heads, spans, device
        self.tables = self._tables()
        generator = torch.Generator().manual_seed(6)
        shape = (heads.num_kv_heads, heads.head_dim)
        self.k_cache, self.v_cache = (
            torch.full((2 + sum(map(len, self.tables)), heads.block_size, *shape), torch.nan, dtype=dtype)
            for _ in range(2)
        )
        for table, span in zip(self.tables, spans, strict=True):
            for position in range(span.first_key, span.end_key):
                slot = (table[position // heads.block_size], position % heads.block_size)
                for cache in (self.k_cache, self.v_cache):
                    cache[slot] = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        num_rows = sum(span.num_tokens for span in spans)
        self.q, self.d_out = (
            torch.randn(num_rows, heads.num_heads, heads.head_dim, generator=generator, dtype=torch.float64)
            .to(dtype)
            .to(device)
            for _ in range(2)
        )
        self.k_cache, self.v_cache = self.k_cache.to(device), self.v_cache.to(device)

    def decode(self) -> AttentionBatch:
        return AttentionBatch(
            [DecodeRow(t, span.end_key) for t, span in zip(self.tables, self.spans, strict=True)], ()
        )

    def chunks(self, first: int = 0) -> AttentionBatch:
        """Sequences from `first` on as chunks, those before as decode rows."""
        chunks, row = [], first
        for table, span in list(zip(self.tables, self.spans, strict=True))[first:]:
            tensor = torch.tensor(table, device=self.device)
            chunks.append(
                make_chunk(row, span.num_tokens, span.first_key, span.end_key, tensor, self.heads.block_size)
            )
            row += span.num_tokens
        return AttentionBatch(self.decode().decode[:first], chunks)

    def targets(self, padding: int = 3) -> list[KeyTarget]:
        """Accumulators of each sequence that hold ones, with room before and behind its keys."""
        dtype = torch.float64 if self.q.dtype == torch.float64 else torch.float32
        shape = (self.heads.num_kv_heads, self.heads.head_dim)
        return [
            KeyTarget(
                *(
                    torch.ones(
                        (span.end_key - span.first_key + 2 * padding, *shape), dtype=dtype, device=self.device
                    )
                    for _ in range(2)
                ),
                first_key=padding,
            )
            for span in self.spans
        ]

    def defined(self, window: int | None) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Output, and gradients of queries, keys and values: the formula in fp64, one sequence at a time."""
        outs, d_qs, d_ks, d_vs, row = [], [], [], [], 0
        for table, span in zip(self.tables, self.spans, strict=True):
            rows = slice(row, row + span.num_tokens)
            keys = slice(span.first_key, span.end_key)
            q = self.q[rows].double().cpu().requires_grad_()
            k, v = (
                cache.cpu()[list(table)].flatten(0, 1)[keys].double().requires_grad_()
                for cache in (self.k_cache, self.v_cache)
            )
            out = self._attend(q, k, v, window)
            d_q, d_k, d_v = torch.autograd.grad(out, (q, k, v), self.d_out[rows].double().cpu())
            outs.append(out.detach())
            d_qs.append(d_q)
            d_ks.append(d_k)
            d_vs.append(d_v)
            row = rows.stop
        return torch.cat(outs), torch.cat(d_qs), d_ks, d_vs

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        group = self.heads.num_heads // self.heads.num_kv_heads
        positions = torch.arange(len(k) - len(q), len(k)).unsqueeze(1)
        keys = torch.arange(len(k))
        hidden = keys > positions
        if window is not None:
            hidden |= keys <= positions - window
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, dim=1)) * SCALE
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, dim=1))

    def _tables(self) -> list[list[int]]:
        num_blocks = [-(-span.end_key // self.heads.block_size) for span in self.spans]
        shuffled = torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(5)).tolist()
        tables, first = [], 0
        for count in num_blocks:
            tables.append([1 + block for block in shuffled[first : first + count]])
            first += count
        return tables


def assert_near(actual: Tensor, expected: Tensor, implementation: Implementation) -> None:
    scale = expected.abs().max().clamp(min=1.0)
    torch.testing.assert_close(
        actual.double().cpu() / scale, expected / scale, atol=implementation.atol, rtol=0.0
    )


GROUPED = {
    "grouped": Heads(),
    "one head each": Heads(3, 3, 16, 8),
    "seven to one": Heads(7, 1, 24, 4),
}
MIXED = (3, 70, 5, 64, 1, 300, 63, 8, 129)
CHUNKS = (
    Span(5, 0, 5),
    Span(1, 0, 1),
    Span(33, 0, 33),
    Span(17, 3, 50),
    Span(1, 5, 90),
    Span(130, 2, 200),
)


@pytest.mark.parametrize("window", [None, 6, 100])
@pytest.mark.parametrize("lengths", [MIXED, (9,), (16, 16, 16), (7, 9, 8)])
@pytest.mark.parametrize("heads", GROUPED)
def test_decode_rows_of_any_lengths_equal_each_sequence_alone(
    implementation: Implementation, heads: str, lengths: tuple[int, ...], window: int | None
) -> None:
    spans = [Span(1, 0, length) for length in lengths]
    paged = Paged(GROUPED[heads], spans, implementation.dtype, implementation.device)
    out = implementation.ops.paged_attention(
        paged.q, paged.k_cache, paged.v_cache, paged.decode(), scale=SCALE, sliding_window=window
    )
    assert_near(out, paged.defined(window)[0], implementation)


@pytest.mark.parametrize("window", [None, 6, 100])
@pytest.mark.parametrize("heads", GROUPED)
def test_chunks_beside_decode_rows_equal_each_sequence_alone(
    implementation: Implementation, heads: str, window: int | None
) -> None:
    spans = [Span(1, 0, 40), Span(1, 0, 3), *CHUNKS]
    paged = Paged(GROUPED[heads], spans, implementation.dtype, implementation.device)
    out = implementation.ops.paged_attention(
        paged.q, paged.k_cache, paged.v_cache, paged.chunks(2), scale=SCALE, sliding_window=window
    )
    assert_near(out, paged.defined(window)[0], implementation)


@pytest.mark.parametrize("window", [None, 6, 100])
@pytest.mark.parametrize("heads", GROUPED)
def test_gradients_are_those_of_autograd_and_are_added_to_the_accumulators(
    implementation: Implementation, heads: str, window: int | None
) -> None:
    paged = Paged(GROUPED[heads], CHUNKS, implementation.dtype, implementation.device)
    batch, targets = paged.chunks(), paged.targets()
    out, saved = windowed_attention(
        implementation.ops, paged.q, paged.k_cache, paged.v_cache, batch, scale=SCALE, sliding_window=window
    )
    d_q = implementation.ops.attention_backward(paged.d_out, saved, targets)
    expected_out, expected_d_q, d_keys, d_values = paged.defined(window)
    assert_near(out, expected_out, implementation)
    assert_near(d_q, expected_d_q, implementation)
    for target, d_k, d_v in zip(targets, d_keys, d_values, strict=True):
        for accumulator, expected in ((target.d_k, d_k), (target.d_v, d_v)):
            assert_near(accumulator[3:-3], expected + 1, implementation)
            assert (accumulator[:3] == 1).all()
            assert (accumulator[-3:] == 1).all()


def test_gradients_are_the_same_every_time(implementation: Implementation) -> None:
    paged = Paged(Heads(), CHUNKS, implementation.dtype, implementation.device)
    results = []
    for _ in range(2):
        targets = paged.targets()
        _, saved = windowed_attention(
            implementation.ops, paged.q, paged.k_cache, paged.v_cache, paged.chunks(), scale=SCALE
        )
        d_q = implementation.ops.attention_backward(paged.d_out, saved, targets)
        results.append([d_q, *(d for target in targets for d in (target.d_k, target.d_v))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_batch_without_rows_is_nothing(implementation: Implementation) -> None:
    paged = Paged(Heads(), [Span(1, 0, 1)], implementation.dtype, implementation.device)
    q, batch = paged.q[:0], AttentionBatch((), ())
    out, saved = windowed_attention(implementation.ops, q, paged.k_cache, paged.v_cache, batch, scale=SCALE)
    assert out.shape == q.shape
    assert implementation.ops.attention_backward(out, saved, []).shape == q.shape


# ---------------------------------------------------------------- the kernels


@pytest.mark.parametrize("window", [None, 300, 600])
@pytest.mark.parametrize("name", KERNEL_PARAMETERS)
def test_keys_of_decode_rows_are_split_over_programs(
    name: str, window: int | None, device: torch.device
) -> None:
    """Lengths of less than one part, of exactly two, and of some and a key."""
    implementation = kernels(name, device)
    lengths = (5, 512, 1025, 700)
    paged = Paged(Heads(), [Span(1, 0, length) for length in lengths], implementation.dtype, device)
    out = fused.paged_attention(
        paged.q, paged.k_cache, paged.v_cache, paged.decode(), scale=SCALE, sliding_window=window
    )
    shape = fused.table_shape(paged.q, paged.k_cache)
    assert keys_per_part(lengths, shape) == 256
    assert_near(out, paged.defined(window)[0], implementation)


@pytest.mark.parametrize("name", KERNEL_PARAMETERS)
def test_queries_may_be_columns_of_a_wider_matrix(name: str, device: torch.device) -> None:
    implementation = kernels(name, device)
    paged = Paged(Heads(), [Span(1, 0, 9), *CHUNKS], implementation.dtype, device)
    wide = torch.cat((paged.q, torch.full_like(paged.q, torch.nan)), dim=1)
    out = fused.paged_attention(
        wide[:, : paged.heads.num_heads], paged.k_cache, paged.v_cache, paged.chunks(1), scale=SCALE
    )
    assert_near(out, paged.defined(None)[0], implementation)


# ---------------------------------------------------------------- the reference


def test_large_scores_in_bf16_are_as_exact_as_the_librarys_own_attention() -> None:
    """Scores of around a hundred, whose rounding to bf16 would change the weights by tens of percent."""
    paged = Paged(Heads(4, 4, 64, 4), [Span(96, 0, 96)], torch.bfloat16, CPU)
    paged.q.mul_(16.0)
    paged.k_cache.mul_(4.0)
    out = reference.paged_attention(paged.q, paged.k_cache, paged.v_cache, paged.chunks(), scale=SCALE)
    k, v = (c[paged.tables[0]].flatten(0, 1).transpose(0, 1) for c in (paged.k_cache, paged.v_cache))
    library = torch.nn.functional.scaled_dot_product_attention(
        paged.q.transpose(0, 1), k, v, is_causal=True, scale=SCALE
    ).transpose(0, 1)
    expected = paged.defined(None)[0]
    error, library_error = ((x.double() - expected).norm() for x in (out, library))
    assert error < 1.5 * library_error


def test_bf16_is_computed_in_fp32_where_the_library_has_no_bf16_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "has_bf16_products", lambda: False)
    paged = Paged(Heads(), CHUNKS, torch.bfloat16, CPU)
    out, saved = windowed_attention(
        reference, paged.q, paged.k_cache, paged.v_cache, paged.chunks(), scale=SCALE
    )
    targets = paged.targets()
    d_q = reference.attention_backward(paged.d_out, saved, targets)
    expected_out, expected_d_q, d_keys, _ = paged.defined(None)
    assert out.dtype == d_q.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected_out, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(d_q.double(), expected_d_q, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(targets[-1].d_k[3:-3].double() - 1, d_keys[-1], atol=2e-2, rtol=2e-2)


def test_the_library_is_asked_for_bf16_products_and_may_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(reference.has_bf16_products(), bool)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not reference.has_bf16_products()


def test_the_reference_is_differentiable_by_autograd() -> None:
    paged = Paged(Heads(), CHUNKS, torch.float64, CPU)
    paged.q.requires_grad_()
    out = reference.paged_attention(paged.q, paged.k_cache, paged.v_cache, paged.chunks(), scale=SCALE)
    (d_q,) = torch.autograd.grad(out, paged.q, paged.d_out)
    torch.testing.assert_close(d_q, paged.defined(None)[1], atol=1e-12, rtol=1e-12)


# ---------------------------------------------------------------- arguments


def test_arguments_that_do_not_fit_are_refused() -> None:
    paged = Paged(Heads(), CHUNKS, torch.float32, CPU)
    q, k, v, batch = paged.q, paged.k_cache, paged.v_cache, paged.chunks()
    with pytest.raises(ValueError, match="the batch has"):
        attention.paged_attention(q[1:], k, v, batch, scale=SCALE)
    with pytest.raises(ValueError, match=r"the cache is torch\.float64"):
        attention.paged_attention(q, k.double(), v, batch, scale=SCALE)
    with pytest.raises(ValueError, match="do not fit a cache"):
        attention.paged_attention(q[:, :3], k, v, batch, scale=SCALE)
    with pytest.raises(ValueError, match="statistics"):
        attention.paged_attention(q, k, v, batch, scale=SCALE, stats=q[:, :, 0])
    _, saved = windowed_attention(attention, q[:6], k, v, paged.decode(), scale=SCALE)
    with pytest.raises(ValueError, match="decode rows"):
        attention.attention_backward(q[:6], saved, [])


def test_accumulators_that_do_not_fit_are_refused() -> None:
    paged = Paged(Heads(), CHUNKS, torch.float32, CPU)
    _, saved = windowed_attention(
        attention, paged.q, paged.k_cache, paged.v_cache, paged.chunks(), scale=SCALE
    )
    targets = paged.targets()
    with pytest.raises(ValueError, match="targets for 6 chunks"):
        attention.attention_backward(paged.d_out, saved, targets[1:])
    narrow = targets[0]._replace(d_k=targets[0].d_k.bfloat16())
    short = targets[0]._replace(d_v=targets[0].d_v[:4])
    with pytest.raises(ValueError, match=r"may not be torch\.bfloat16"):
        attention.attention_backward(paged.d_out, saved, [narrow, *targets[1:]])
    with pytest.raises(ValueError, match="accumulators"):
        attention.attention_backward(paged.d_out, saved, [short, *targets[1:]])
