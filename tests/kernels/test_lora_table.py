"""The table of adapter weights: what the device tensors hold, what is refused, what moving changes."""

import pytest
import torch

from weft_kernels.lora import LoraEntry, LoraTable


@pytest.fixture
def table() -> LoraTable:
    return LoraTable(torch.arange(4096, dtype=torch.float32), num_slots=3, num_layers=2, num_modules=4)


ENTRY = LoraEntry(
    layer=1, module=2, rank=4, in_features=32, out_features=16, a_offset=64, b_offset=192, scale=0.5
)


def test_device_rows_hold_absolute_offsets_ranks_and_scales(table: LoraTable) -> None:
    table.set_slot(1, 128, [ENTRY])
    assert table.a_offsets[1, 1, 2] == 128 + 64
    assert table.b_offsets[1, 1, 2] == 128 + 192
    assert table.ranks[1, 1, 2] == 4
    assert table.scales[1, 1, 2] == 0.5
    assert table.base.tolist() == [0, 128, 0]
    assert table.ranks.sum() == 4


def test_an_entry_views_the_arena_without_copying(table: LoraTable) -> None:
    table.set_slot(1, 128, [ENTRY])
    entry = table.entry(1, 1, 2)
    assert entry is not None
    assert entry.a.shape == (4, 32)
    assert entry.b.shape == (4, 16)
    assert entry.a[0, 0] == 192
    assert entry.b[0, 0] == 320
    table.weights[192] = -1
    assert entry.a[0, 0] == -1


def test_a_module_that_is_not_adapted_has_no_entry(table: LoraTable) -> None:
    table.set_slot(1, 128, [ENTRY])
    assert table.entry(1, 0, 2) is None
    assert table.entry(0, 1, 2) is None


def test_a_moved_extent_is_seen_at_its_new_place(table: LoraTable) -> None:
    table.set_slot(1, 128, [ENTRY])
    assert table.entry(1, 1, 2) is not None
    table.set_slot(1, 1024, [ENTRY])
    entry = table.entry(1, 1, 2)
    assert entry is not None
    assert entry.a[0, 0] == 1024 + 64


def test_a_cleared_slot_adapts_nothing(table: LoraTable) -> None:
    table.set_slot(1, 128, [ENTRY])
    table.clear_slot(1)
    assert table.entry(1, 1, 2) is None
    assert table.ranks.sum() == 0
    assert table.max_rank(1) == 0


def test_adjacent_matrices_of_a_group_are_viewed_as_one(table: LoraTable) -> None:
    entries = [
        LoraEntry(0, 0, 4, 32, 16, 0, 256, 1.0),
        LoraEntry(0, 1, 4, 32, 16, 128, 320, 1.0),
    ]
    table.set_slot(0, 0, entries)
    group = table.group(0, 0, (0, 1, 2))
    assert group is not None
    assert group.stacked_a is not None
    assert group.stacked_a.shape == (8, 32)
    assert group.num_ranks == 8


def test_matrices_with_a_gap_between_them_are_not_viewed_as_one(table: LoraTable) -> None:
    entries = [LoraEntry(0, 0, 4, 32, 16, 0, 256, 1.0), LoraEntry(0, 1, 4, 32, 16, 384, 320, 1.0)]
    table.set_slot(0, 0, entries)
    group = table.group(0, 0, (0, 1))
    assert group is not None
    assert group.stacked_a is None


@pytest.mark.parametrize(
    ("slot", "base", "change", "error", "message"),
    [
        (3, 0, {}, IndexError, "slot 3"),
        (0, 32, {}, ValueError, "multiple of 64"),
        (0, 0, {"a_offset": 8}, ValueError, "offset 8 of A"),
        (0, 0, {"b_offset": 8}, ValueError, "offset 8 of B"),
        (0, 4032, {}, ValueError, "reaches past the arena of 4096"),
        (0, 0, {"layer": 2}, IndexError, "layer 2"),
        (0, 0, {"module": 4}, IndexError, "module 4"),
        (0, 0, {"rank": 0}, ValueError, "must be positive"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused(
    table: LoraTable, slot: int, base: int, change: dict[str, int], error: type[Exception], message: str
) -> None:
    values = {name: getattr(ENTRY, name) for name in LoraEntry.__dataclass_fields__} | change
    with pytest.raises(error, match=message):
        table.set_slot(slot, base, [LoraEntry(**values)])


def test_two_entries_for_one_module_are_refused(table: LoraTable) -> None:
    with pytest.raises(ValueError, match="two entries"):
        table.set_slot(0, 0, [ENTRY, LoraEntry(1, 2, 2, 32, 16, 320, 384, 1.0)])


def test_an_arena_that_is_not_flat_is_refused() -> None:
    with pytest.raises(ValueError, match="flat"):
        LoraTable(torch.zeros(4, 4), 1, 1, 1)
