"""Adapters that are multiplied together: the sums of those multiplied one by one, never stale, never a
neighbour's."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from weft_kernels.lora import LoraBatch, lora_forward, stacks
from weft_kernels.prepacked import can_prepack

WIDTHS = {0: 64, 1: 32, 2: 130}
MODULES = (0, 1, 2)
RANKS = {0: {0: 8, 1: 8, 2: 8}, 1: {0: 3, 2: 17}, 2: {0: 40, 1: 16, 2: 64}, 3: {1: 5}}
IN_WIDTH = 72
DECODE = [(0, 0, 1), (1, 1, 2), (2, 3, 1), (3, 4, 3)]


@pytest.fixture
def adapters(make_adapters: Callable[..., Any]) -> Any:
    if not can_prepack(torch.device("cpu"), torch.bfloat16):
        pytest.skip("this machine's library lays no weights out")
    return make_adapters(RANKS, WIDTHS, IN_WIDTH, torch.bfloat16)


def batch_of(runs: list[tuple[int, int, int]]) -> LoraBatch:
    batch = LoraBatch.build(runs, "cpu")
    assert batch is not None
    return batch


def inputs(num_rows: int) -> Tensor:
    return torch.randn(num_rows, IN_WIDTH, generator=torch.Generator().manual_seed(5)).bfloat16()


def updated(
    adapters: Any, x: Tensor, runs: list[tuple[int, int, int]], modules: tuple[int, ...] = MODULES
) -> Tensor:
    """What a new batch of these runs adds."""
    widths = [WIDTHS[module] for module in modules]
    y = torch.zeros(len(x), sum(widths), dtype=x.dtype)
    lora_forward(x, y, adapters.table, 1, modules, widths, batch_of(runs))
    return y


def expected(
    adapters: Any, x: Tensor, runs: list[tuple[int, int, int]], modules: tuple[int, ...] = MODULES
) -> Tensor:
    """The definition, row by row in float64."""
    y = torch.zeros(len(x), sum(WIDTHS[module] for module in modules), dtype=torch.float64)
    for slot, start, length in runs:
        column = 0
        for module in modules:
            entry = adapters.table.entry(slot, 1, module)
            if entry is not None:
                v = x[start : start + length].double() @ entry.a.double().T
                y[start : start + length, column : column + WIDTHS[module]] += (
                    entry.scale * v @ entry.b.double()
                )
            column += WIDTHS[module]
    return y


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2)


def num_stacks(adapters: Any) -> int:
    """Groups of modules that are multiplied in stacks at present."""
    return sum(len(kept.groups) for kept in adapters.table.stacks._sets.values())


@pytest.mark.parametrize("modules", [(0,), MODULES], ids=str)
@pytest.mark.parametrize(
    "runs",
    [
        DECODE,
        [(2, 0, 1)],
        [(1, 5, 1), (0, 7, 2), (3, 11, 1)],
        [(0, 0, 1), (2, 1, 4), (1, 5, 20), (3, 30, 1)],
        [(0, 0, 2), (1, 2, 1), (0, 40, 20)],
    ],
    ids=["decode", "one", "scattered", "beside-a-prompt", "slot-in-both"],
)
def test_rows_of_several_adapters_get_their_own_updates(
    adapters: Any, runs: list[tuple[int, int, int]], modules: tuple[int, ...]
) -> None:
    x = inputs(60)
    wanted = expected(adapters, x, runs, modules)
    assert_close(updated(adapters, x, runs, modules), wanted)
    assert num_stacks(adapters) == 0
    for _ in range(2):
        assert_close(updated(adapters, x, runs, modules), wanted)
        assert num_stacks(adapters) == 1


def test_modules_whose_zeros_would_cost_more_than_a_call_stay_apart(adapters: Any) -> None:
    x = inputs(7)
    with mock.patch.object(stacks, "_CALL_BYTES", 0):
        updated(adapters, x, DECODE)
        apart = updated(adapters, x, DECODE)
        [group] = next(iter(adapters.table.stacks._sets.values())).groups.values()
    assert [(block.first_member, block.end_member) for block in group.blocks] == [(0, 1), (1, 2), (2, 3)]
    assert_close(apart, expected(adapters, x, DECODE))


def test_new_weights_are_used_at_once(adapters: Any) -> None:
    x = inputs(7)
    for _ in range(2):
        updated(adapters, x, DECODE)
    adapters.table.entry(2, 1, 0).b.mul_(-3)
    for _ in range(3):
        assert_close(updated(adapters, x, DECODE), expected(adapters, x, DECODE))


def test_a_slot_that_changes_hands_is_not_read_from_a_stack(adapters: Any) -> None:
    x = inputs(7)
    for _ in range(2):
        updated(adapters, x, DECODE)
    adapters.table.set_slot(0, adapters.bases[2], adapters.entries[2])
    adapters.table.clear_slot(1)
    for _ in range(3):
        assert_close(updated(adapters, x, DECODE), expected(adapters, x, DECODE))


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3e38])
@pytest.mark.parametrize("matrix", ["a", "b"])
def test_no_row_sees_a_neighbours_overflow(adapters: Any, matrix: str, value: float) -> None:
    x = inputs(7)
    getattr(adapters.table.entry(2, 1, 0), matrix).fill_(value)
    others = [0, 1, 2, 4, 5, 6]
    for _ in range(3):
        assert_close(updated(adapters, x, DECODE)[others], expected(adapters, x, DECODE)[others])


def test_sets_of_adapters_beyond_the_memory_limit_are_multiplied_one_by_one(adapters: Any) -> None:
    x = inputs(7)
    with mock.patch.object(stacks, "MAX_STACK_BYTES", 1000):
        for _ in range(3):
            assert_close(updated(adapters, x, DECODE), expected(adapters, x, DECODE))
        assert num_stacks(adapters) == 0


def test_the_oldest_stacks_make_room(adapters: Any) -> None:
    x = inputs(7)
    all_elements = sum(adapters.table.num_elements(slot) for slot in RANKS)
    with mock.patch.object(stacks, "MAX_STACK_BYTES", 2 * all_elements):
        for runs in (DECODE, DECODE[:2], DECODE[1:], DECODE):
            for _ in range(2):
                assert_close(updated(adapters, x, runs), expected(adapters, x, runs))
            assert num_stacks(adapters) == 1


@pytest.mark.parametrize("distance", [128, 128 + 64], ids=["even", "uneven"])
def test_segments_of_equal_length_are_one_batched_product(
    make_adapters: Callable[..., Any], distance: int
) -> None:
    adapters = make_adapters(dict.fromkeys(range(4), RANKS[0]), WIDTHS, IN_WIDTH, torch.float64)
    end = adapters.bases[3] + distance - 128
    adapters.table.weights[end : end + adapters.sizes[3]] = adapters.table.weights[
        adapters.bases[3] : adapters.bases[3] + adapters.sizes[3]
    ].clone()
    adapters.table.set_slot(3, end, adapters.entries[3])
    runs = [(slot, 2 + 11 * slot, 11) for slot in range(4)]
    x = inputs(50).double()
    torch.testing.assert_close(updated(adapters, x, runs), expected(adapters, x, runs))
    uneven = [(0, 2, 11), (1, 13, 12), (2, 25, 11)]
    torch.testing.assert_close(updated(adapters, x, uneven), expected(adapters, x, uneven))
