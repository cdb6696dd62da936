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


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack as soon as an adapter is in none."""
    monkeypatch.setattr(stacks, "PATIENCE", 1)


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
    return sum(len(stack.groups) for stack in adapters.table.stacks._stacks)


def stacked_slots(adapters: Any) -> list[set[int]]:
    """The adapters of each stack that has groups."""
    return [set(stack.versions) for stack in adapters.table.stacks._stacks if stack.groups]


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
    with mock.patch.object(stacks, "MAX_STACK_BYTES", 0):
        alone = updated(adapters, x, runs, modules)
    assert num_stacks(adapters) == 0
    stacked = updated(adapters, x, runs, modules)
    assert num_stacks(adapters) == 1
    assert_close(alone, wanted)
    assert_close(stacked, wanted)


def test_modules_whose_zeros_would_cost_more_than_a_call_stay_apart(adapters: Any) -> None:
    x = inputs(7)
    with mock.patch.object(stacks, "_CALL_BYTES", 0):
        apart = updated(adapters, x, DECODE)
        [group] = adapters.table.stacks._stacks[0].groups.values()
    assert [(block.first_member, block.end_member) for block in group.blocks] == [(0, 1), (1, 2), (2, 3)]
    assert_close(apart, expected(adapters, x, DECODE))


@pytest.mark.parametrize("slots", [(0,), (1, 3), (0, 1, 2)], ids=str)
def test_a_stack_serves_any_of_its_adapters(adapters: Any, slots: tuple[int, ...]) -> None:
    x = inputs(12)
    updated(adapters, x, DECODE)
    runs = [(slot, 2 * slot, 2) for slot in slots]
    assert_close(updated(adapters, x, runs), expected(adapters, x, runs))
    assert num_stacks(adapters) == 1


def test_an_adapter_in_no_stack_goes_alone_beside_those_in_one(
    adapters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = inputs(12)
    updated(adapters, x, [(0, 0, 1), (2, 4, 2)])
    monkeypatch.setattr(stacks, "PATIENCE", 100)
    for runs in (DECODE, [(0, 3, 1), (1, 0, 2)], [(1, 0, 1), (3, 1, 1)]):
        assert_close(updated(adapters, x, runs), expected(adapters, x, runs))
    assert stacked_slots(adapters) == [{0, 2}]


def test_a_stack_is_made_when_enough_adapters_have_gone_alone(
    adapters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "PATIENCE", 3 * len(DECODE))
    x = inputs(7)
    for _ in range(2):
        updated(adapters, x, DECODE)
        assert num_stacks(adapters) == 0
    updated(adapters, x, DECODE)
    assert num_stacks(adapters) == 1


def test_a_stack_has_the_adapters_that_were_seen_lately(adapters: Any) -> None:
    x = inputs(12)
    with mock.patch.object(stacks, "PATIENCE", 3):
        updated(adapters, x, [(1, 0, 1)])
        updated(adapters, x, [(3, 0, 1)])
        updated(adapters, x, [(0, 2, 1)])
    assert stacked_slots(adapters) == [{0, 1, 3}]


def test_a_batch_adds_few_groups(adapters: Any) -> None:
    x, runs = inputs(7), [(0, 0, 1), (1, 1, 1)]
    groups = [(0,), (1,), (2,), (0, 1), (1, 2), MODULES]
    widths = [[WIDTHS[module] for module in modules] for modules in groups]
    with mock.patch.object(stacks, "GROUPS_PER_BATCH", 4):
        for num_expected in (4, 6, 6):
            batch = batch_of(runs)
            for modules, sizes in zip(groups, widths, strict=True):
                y = torch.zeros(len(x), sum(sizes), dtype=x.dtype)
                lora_forward(x, y, adapters.table, 1, modules, sizes, batch)
                assert_close(y, expected(adapters, x, runs, modules))
            assert num_stacks(adapters) == num_expected


def test_new_weights_are_used_at_once(adapters: Any) -> None:
    x = inputs(7)
    updated(adapters, x, DECODE)
    adapters.table.entry(2, 1, 0).b.mul_(-3)
    adapters.table.touch(2)
    for _ in range(2):
        assert_close(updated(adapters, x, DECODE), expected(adapters, x, DECODE))


def test_weights_that_change_within_a_batch_are_used_at_once(adapters: Any) -> None:
    x, batch, widths = inputs(7), batch_of(DECODE), list(WIDTHS.values())
    for factor in (1.0, -3.0):
        adapters.table.entry(2, 1, 0).b.mul_(factor)
        adapters.table.touch(2)
        y = torch.zeros(len(x), sum(widths), dtype=x.dtype)
        lora_forward(x, y, adapters.table, 1, MODULES, widths, batch)
        assert_close(y, expected(adapters, x, DECODE))


def test_an_adapter_that_changes_leaves_stacks_without_it_alone(adapters: Any) -> None:
    x = inputs(12)
    updated(adapters, x, [(0, 0, 1)])
    updated(adapters, x, [(3, 0, 1)])
    assert stacked_slots(adapters) == [{0}, {0, 3}]
    adapters.table.touch(3)
    updated(adapters, x, [(0, 0, 1)])
    assert stacked_slots(adapters) == [{0}]


def test_a_slot_that_changes_hands_is_not_read_from_a_stack(adapters: Any) -> None:
    x = inputs(7)
    updated(adapters, x, DECODE)
    adapters.table.set_slot(0, adapters.bases[2], adapters.entries[2])
    adapters.table.clear_slot(1)
    for _ in range(2):
        assert_close(updated(adapters, x, DECODE), expected(adapters, x, DECODE))


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3e38])
@pytest.mark.parametrize("matrix", ["a", "b"])
def test_no_row_sees_a_neighbours_overflow(adapters: Any, matrix: str, value: float) -> None:
    x = inputs(7)
    getattr(adapters.table.entry(2, 1, 0), matrix).fill_(value)
    adapters.table.touch(2)
    others = [0, 1, 2, 4, 5, 6]
    for _ in range(2):
        assert_close(updated(adapters, x, DECODE)[others], expected(adapters, x, DECODE)[others])


def test_adapters_beyond_the_memory_limit_are_multiplied_one_by_one(adapters: Any) -> None:
    x = inputs(7)
    itemsize = adapters.table.weights.element_size()
    most = (adapters.table.num_elements(0) + adapters.table.num_elements(3)) * itemsize
    with mock.patch.object(stacks, "MAX_STACK_BYTES", most):
        for _ in range(3):
            assert_close(updated(adapters, x, DECODE), expected(adapters, x, DECODE))
        assert stacked_slots(adapters) == [{0, 3}]


def test_the_stack_that_serves_least_makes_room(adapters: Any) -> None:
    x = inputs(7)
    all_elements = sum(adapters.table.num_elements(slot) for slot in RANKS)
    with mock.patch.object(stacks, "MAX_STACK_BYTES", 2 * all_elements):
        updated(adapters, x, DECODE[:2])
        assert stacked_slots(adapters) == [{0, 1}]
        for _ in range(2):
            assert_close(updated(adapters, x, DECODE), expected(adapters, x, DECODE))
            assert stacked_slots(adapters) == [{0, 1, 2, 3}]


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
