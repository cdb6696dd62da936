"""Packs and waves by themselves: ragged waves, drops at layer boundaries and nowhere else, leaving a wave."""

from __future__ import annotations

import pytest

from weft_scheduler.training import Pack, PackSpec, PackStatus, TrainingQueue


def ready(training: TrainingQueue, pack_id: str, num_tokens: int) -> Pack:
    """A pack of its own job whose forward is complete."""
    training.add_job(pack_id, f"job:{pack_id}")
    pack = training.add_pack(PackSpec(pack_id, pack_id, "t", num_tokens, f"job:{pack_id}", num_tokens), 0.0)
    forward(training, pack)
    return pack


def forward(training: TrainingQueue, pack: Pack) -> None:
    training.admit(pack, [0])
    while pack.status is PackStatus.FORWARDING:
        training.forwarded(pack, training.most_forward(pack))
    assert pack.status is PackStatus.READY


def slices(training: TrainingQueue, count: int) -> list[tuple[int, int, tuple[str, ...]]]:
    """Plan up to `count` slices of waves, as (layer, window, packs); completed packs lose their blocks."""
    planned = []
    for _ in range(count):
        wave = training.next_wave()
        if wave is None:
            break
        part, done = training.sliced(wave, 1)
        planned.append((part.layer, part.window, part.pack_ids))
        for pack in done:
            pack.block_ids = ()
        training.check_invariants()
    return planned


def test_short_packs_join_a_wave_only_in_the_windows_that_they_have() -> None:
    training = TrainingQueue(num_layers=2, window_tokens=8)
    ready(training, "short", 8)
    ready(training, "long", 17)
    both, alone = ("short", "long"), ("long",)
    assert slices(training, 99) == [
        (layer, window, both if window == 0 else alone) for layer in (1, 0) for window in (2, 1, 0)
    ]


def test_a_pack_of_a_wave_is_dropped_only_between_layers_and_resumes_at_its_cursor() -> None:
    training = TrainingQueue(num_layers=3, window_tokens=8)
    pack, other = ready(training, "pack", 16), ready(training, "other", 24)
    assert len(slices(training, 4)) == 4
    assert not training.can_drop(pack)
    with pytest.raises(ValueError, match=r"pack \(in wave\) cannot be dropped now"):
        training.drop(pack, 0.0)
    slices(training, 2)
    assert training.drop(pack, 0.0) == (0,)
    assert pack.cursor_layer == 0
    assert slices(training, 99) == [(0, 2, ("other",)), (0, 1, ("other",)), (0, 0, ("other",))]
    assert other.status is PackStatus.DONE
    forward(training, pack)
    assert slices(training, 99) == [(0, 1, ("pack",)), (0, 0, ("pack",))]


def test_a_dropped_pack_whose_loss_is_complete_is_forwarded_without_it() -> None:
    training = TrainingQueue(num_layers=1, window_tokens=8)
    training.add_job("j", "job:j")
    pack = training.add_pack(PackSpec("p", "j", "t", 16, "job:j", 16), 0.0)
    training.admit(pack, [0])
    training.forwarded(pack, 8)
    training.drop(pack, 0.0)
    assert not pack.has_loss
    training.admit(pack, [0])
    training.forwarded(pack, 8)
    assert not pack.has_loss
    training.forwarded(pack, 8)
    assert pack.has_loss
    training.drop(pack, 0.0)
    training.admit(pack, [0])
    assert pack.has_loss


def test_packs_at_different_layers_go_in_different_waves() -> None:
    training = TrainingQueue(num_layers=4, window_tokens=8)
    early = ready(training, "early", 8)
    slices(training, 2)
    training.drop(early, 0.0)
    ready(training, "fresh", 8)
    forward(training, early)
    assert slices(training, 99) == [
        *((layer, 0, ("fresh",)) for layer in (3, 2, 1, 0)),
        *((layer, 0, ("early",)) for layer in (1, 0)),
    ]


def test_removing_the_longest_pack_inside_a_layer_leaves_the_others_windows_whole() -> None:
    training = TrainingQueue(num_layers=2, window_tokens=8)
    ready(training, "short", 8)
    ready(training, "long", 32)
    slices(training, 2)
    assert training.remove_job("long") is not None
    training.check_invariants()
    assert slices(training, 99) == [(1, 0, ("short",)), (0, 0, ("short",))]


def test_activations_of_packs_that_left_count_until_no_plan_in_flight_touches_them() -> None:
    training = TrainingQueue(num_layers=1, window_tokens=8)
    pack = ready(training, "p", 8)
    pack.last_planned = 7
    training.drop(pack, 0.0)
    training.release_retired(6)
    assert training.alive_tokens == 8
    training.release_retired(7)
    assert training.alive_tokens == 0


def test_a_rewound_wave_stands_at_the_slice_that_did_not_run_and_later_waves_dissolve() -> None:
    training = TrainingQueue(num_layers=2, window_tokens=8)
    old, resumed = ready(training, "old", 16), ready(training, "resumed", 8)
    resumed.cursor_layer = 0
    newest = training.add_pack(PackSpec("newest", "old", "t", 8, "job:old", 8), 0.0)
    training.admit(newest, [9])
    first = training.next_wave()
    assert first is not None
    parts = [training.sliced(first, 1)[0] for _ in range(4)]
    assert (old.status, training.alive) == (PackStatus.DONE, [resumed, newest])
    second = training.next_wave()  # formed, and no room for a slice of it
    assert second is not None
    assert second.packs == [resumed]
    assert training.rewind([first], parts[2], 1) == [old]
    assert training.wave is first
    assert (first.layer, first.window) == (0, 1)
    assert (old.status, resumed.status) == (PackStatus.IN_WAVE, PackStatus.READY)
    assert training.alive == [old, resumed, newest]
    training.check_invariants()
    assert slices(training, 99) == [(0, 1, ("old",)), (0, 0, ("old",)), (0, 0, ("resumed",))]


def test_a_rewound_wave_has_lost_the_packs_of_removed_jobs() -> None:
    training = TrainingQueue(num_layers=2, window_tokens=8)
    ready(training, "short", 8)
    ready(training, "long", 17)
    wave = training.next_wave()
    assert wave is not None
    parts = [training.sliced(wave, 1)[0] for _ in range(5)]
    training.remove_job("long")
    assert training.rewind([wave], parts[3], 1) == []
    training.check_invariants()
    assert slices(training, 99) == [(0, 0, ("short",))]
    training.release_retired(1)
    assert training.alive_tokens == 0
