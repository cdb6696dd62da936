"""The device arena: what its table shows after loads, writes and clears."""

from __future__ import annotations

import pytest
import torch

from weft_server.adapters.arena import AdapterArena
from weft_server.adapters.image import HostImage
from weft_server.adapters.packed import PackedAdapter, new_adapter, repack

SHAPES = {"q_proj": (32, 48), "up_proj": (32, 64)}
CPU = torch.device("cpu")


def _adapter(rank: int, seed: int, modules: tuple[str, ...] = ("q_proj", "up_proj")) -> PackedAdapter:
    fresh = new_adapter(
        rank=rank,
        alpha=2 * rank,
        dropout=0.0,
        target_modules=modules,
        use_rslora=False,
        num_layers=2,
        shapes=SHAPES,
        seed=seed,
    )
    return repack(fresh, torch.randn(fresh.num_elements, generator=torch.Generator().manual_seed(seed)))


def _image(adapter: PackedAdapter, dtype: torch.dtype = torch.float32) -> HostImage:
    return HostImage.build(adapter, dtype)


def _arena(num_elements: int = 1 << 16, dtype: torch.dtype = torch.float32, device: torch.device = CPU):
    return AdapterArena(num_elements, 4, 2, dtype, device)


def _assert_resident(arena: AdapterArena, slot: int, adapter: PackedAdapter) -> None:
    for layer in range(2):
        for module in range(7):
            entry = arena.table.entry(slot, layer, module)
            expected = adapter.layout.lookup(layer, module)
            if expected is None:
                assert entry is None
                continue
            cast = adapter.to(arena.weights.dtype).weights
            assert torch.equal(entry.a.cpu(), adapter.layout.a(cast, layer, module))
            assert torch.equal(entry.b.cpu(), adapter.layout.b(cast, layer, module))
            assert entry.rank == expected.rank
            assert entry.scale == adapter.scales[layer, expected.module_name] == 2.0


def test_loaded_adapters_are_seen_through_the_table():
    arena, one, two = _arena(), _adapter(4, 1), _adapter(9, 2, ("q_proj",))
    arena.load(0, 0, _image(one))
    arena.load(3, one.num_elements, _image(two))
    _assert_resident(arena, 0, one)
    _assert_resident(arena, 3, two)
    assert arena.table.entry(1, 0, 0) is None


def test_a_cleared_slot_adapts_nothing_and_its_extent_can_be_loaded_again():
    arena, one, two = _arena(), _adapter(4, 1), _adapter(2, 2)
    arena.load(0, 64, _image(one))
    arena.clear(0)
    assert arena.table.entry(0, 0, 0) is None
    arena.load(1, 64, _image(two))
    _assert_resident(arena, 1, two)


def test_nothing_is_visible_before_a_load_is_finished():
    arena, one = _arena(), _adapter(4, 1)
    handle = arena.load_async(2, 0, _image(one))
    assert handle.ready()
    assert arena.table.entry(2, 0, 0) is None
    with pytest.raises(ValueError, match="still loading"):
        arena.clear(2)
    with pytest.raises(ValueError, match="no loaded adapter"):
        arena.write(2, one.weights)
    handle.finish()
    _assert_resident(arena, 2, one)
    with pytest.raises(RuntimeError, match="already finished"):
        handle.finish()


def test_writing_refreshes_the_weights_in_place_and_casts():
    arena, one = _arena(dtype=torch.bfloat16), _adapter(4, 1)
    arena.load(1, 128, _image(one, torch.bfloat16))
    view = arena.table.entry(1, 0, 0).a
    master = torch.randn(one.num_elements, generator=torch.Generator().manual_seed(8))
    version = arena.table.slot_version(1)
    arena.write(1, master)
    assert arena.table.slot_version(1) != version
    assert torch.equal(view, one.layout.a(master, 0, "q_proj").bfloat16())
    assert torch.equal(arena.view(1), master.bfloat16())
    assert not arena.weights[:128].any()
    assert not arena.weights[128 + one.num_elements :].any()


@pytest.mark.parametrize(
    ("slot", "offset", "named"),
    [
        (0, 1024, "slot 0 is taken"),
        (4, 1024, "slot 4 is outside"),
        (-1, 1024, "slot -1 is outside"),
        (1, 0, "overlaps the one of slot 0"),
        (1, 512, "overlaps the one of slot 0"),
        (1, 1000, "not aligned"),
        (1, -64, "not aligned"),
        (1, (1 << 16) - 64, "within the arena"),
    ],
)
def test_a_load_that_would_touch_anothers_bytes_is_refused_and_changes_nothing(slot, offset, named):
    arena, one, two = _arena(), _adapter(4, 1), _adapter(4, 2)
    arena.load(0, 0, _image(one))
    before = arena.weights.clone()
    with pytest.raises(ValueError, match=named):
        arena.load(slot, offset, _image(two))
    assert torch.equal(arena.weights, before)
    _assert_resident(arena, 0, one)
    arena.load(1, 4096, _image(two))


def test_misuse_of_empty_slots_and_wrong_sizes_is_refused():
    arena, one = _arena(), _adapter(4, 1)
    with pytest.raises(ValueError, match="empty"):
        arena.clear(0)
    with pytest.raises(ValueError, match="no loaded adapter"):
        arena.view(0)
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        arena.load(0, 0, _image(one, torch.bfloat16))
    arena.load(0, 0, _image(one))
    with pytest.raises(ValueError, match="elements"):
        arena.write(0, one.weights[:-1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_side_stream_load_is_seen_by_kernels_launched_after_finish():
    device = torch.device("cuda")
    arena = _arena(1 << 20, torch.bfloat16, device)
    adapters = [_adapter(rank, rank) for rank in (3, 16, 64)]
    offset, handles = 0, []
    for slot, adapter in enumerate(adapters):
        image = HostImage.build(adapter, torch.bfloat16, pin_memory=True)
        assert image.weights.is_pinned()
        handles.append(arena.load_async(slot, offset, image))
        offset += adapter.num_elements
    for handle in handles:
        handle.finish()
    seen = [arena.view(slot).clone() for slot in range(3)]
    torch.cuda.synchronize()
    assert all(handle.ready() for handle in handles)
    for slot, adapter in enumerate(adapters):
        assert torch.equal(seen[slot].cpu(), adapter.weights.bfloat16())
        _assert_resident(arena, slot, adapter)
    master = torch.randn(adapters[0].num_elements, device=device)
    arena.write(0, master)
    assert torch.equal(arena.view(0), master.bfloat16())


@pytest.mark.parametrize("destination", [0, 64, 192, 320, 4096])
def test_a_moved_adapter_is_seen_at_its_new_place_even_if_that_overlaps_the_old_one(destination, monkeypatch):
    monkeypatch.setattr("weft_server.adapters.arena._MOVE_CHUNK_ELEMENTS", 100)
    arena, one, two = _arena(), _adapter(4, 1), _adapter(2, 2)
    arena.load(1, 192, _image(one))
    arena.load(2, 16384, _image(two))
    arena.move(1, destination)
    _assert_resident(arena, 1, one)
    _assert_resident(arena, 2, two)
    assert arena.view(1).data_ptr() == arena.weights[destination:].data_ptr()
    arena.write(1, 2 * one.weights)
    assert torch.equal(arena.table.entry(1, 0, 0).a, one.layout.a(2 * one.weights, 0, "q_proj"))
    arena.clear(1)
    arena.load(3, 192, _image(one))
    _assert_resident(arena, 3, one)


@pytest.mark.parametrize(
    ("slot", "destination", "named"),
    [
        (0, 0, "no loaded adapter"),
        (3, 0, "no loaded adapter"),
        (1, 16320, "overlaps the one of slot 2"),
        (1, 100, "not aligned"),
        (1, -64, "not aligned"),
        (1, (1 << 16) - 64, "within the arena"),
    ],
)
def test_a_move_that_would_touch_anothers_bytes_is_refused_and_changes_nothing(slot, destination, named):
    arena, one, two = _arena(), _adapter(4, 1), _adapter(2, 2)
    arena.load(1, 192, _image(one))
    arena.load(2, 16384, _image(two))
    handle = arena.load_async(3, 32768, _image(two))
    before = arena.weights.clone()
    with pytest.raises(ValueError, match=named):
        arena.move(slot, destination)
    assert torch.equal(arena.weights, before)
    _assert_resident(arena, 1, one)
    handle.finish()
    _assert_resident(arena, 3, two)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_load_into_the_place_that_a_move_leaves_does_not_overtake_it():
    device = torch.device("cuda")
    arena = _arena(1 << 24, torch.bfloat16, device)
    one, two = _adapter(64, 1), _adapter(64, 2)
    arena.load(0, 64, HostImage.build(one, torch.bfloat16, pin_memory=True))
    big = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        big = big @ big
    arena.move(0, 1 << 22)
    handle = arena.load_async(1, 64, HostImage.build(two, torch.bfloat16, pin_memory=True))
    handle.finish()
    torch.cuda.synchronize()
    _assert_resident(arena, 0, one)
    _assert_resident(arena, 1, two)
