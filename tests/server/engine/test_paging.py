"""Adapters come and go: what is answered does not depend on where they were."""

from __future__ import annotations

import threading

import pytest

from weft_server.errors import Unavailable
from weft_server.protocol import SetPinnedAdapters

NUM_ADAPTERS = 200
ELEMENTS_FOR_8 = 8 * 2048


def _fleet(make):
    modules = (("q_proj", "v_proj"), ("k_proj", "down_proj"), ("o_proj", "gate_proj"))
    return [make.adapter(i, 1 + i % 5, modules[i % 3]) for i in range(NUM_ADAPTERS)]


def test_an_arena_for_eight_serves_two_hundred_adapters_alike(harness, make):
    fleet = _fleet(make)
    answers, built = [], []
    for limits in (
        {"num_adapter_slots": 256, "arena_elements": 1 << 22},
        {"num_adapter_slots": 8, "arena_elements": ELEMENTS_FOR_8},
    ):
        h = harness(**limits, max_num_seqs=16, max_batch_tokens=96)
        for i, adapter in enumerate(fleet):
            h.generate(f"r{i}", make.prompt(5), adapter=h.store(adapter), max_tokens=4, tenant=f"t{i % 7}")
        h.run()
        assert not h.failures()
        answers.append([h.tokens(f"r{i}") for i in range(NUM_ADAPTERS)])
        built.append(h)
    assert all(len(tokens) == 4 for tokens in answers[1])
    assert answers[0] == answers[1]
    assert len({tuple(tokens) for tokens in answers[0]}) > 20, "the adapters do not matter"
    counters = built[1].engine.heartbeat().counters
    assert counters["adapter_loads"] >= NUM_ADAPTERS
    assert counters["adapter_evictions"] >= NUM_ADAPTERS - 8
    assert built[0].engine.heartbeat().counters["adapter_evictions"] == 0


def test_a_slow_store_blocks_no_iteration(harness, make):
    gate = threading.Event()
    h = harness()
    ready, slow = h.store(make.adapter(1)), h.store(make.adapter(2))
    late = harness(blobs=h.blobs, read=lambda blob: _wait(gate, blob, slow.weights_blob, h.blobs))
    late.generate("slow", make.prompt(5), adapter=slow, max_tokens=6)
    late.generate("base", make.prompt(5), max_tokens=30)
    late.generate("ready", make.prompt(5), adapter=ready, max_tokens=30)
    late.run(until=lambda: late.finish_reason("base") and late.finish_reason("ready"))
    assert not late.tokens("slow")
    assert late.engine.awaits_background
    gate.set()
    late.run()
    h.generate("slow", make.prompt(5), adapter=slow, max_tokens=6)
    h.run()
    assert late.tokens("slow") == h.tokens("slow")
    assert len(h.tokens("slow")) == 6


def _wait(gate, blob, slow_blob, blobs):
    if blob == slow_blob:
        assert gate.wait(30)
    return blobs.read(blob)


def test_a_request_aborted_while_its_adapter_is_fetched_leaves_nothing(harness, make):
    gate = threading.Event()
    source = harness()
    slow = source.store(make.adapter(2))
    h = harness(blobs=source.blobs, read=lambda blob: _wait(gate, blob, slow.weights_blob, source.blobs))
    h.generate("slow", make.prompt(5), adapter=slow)
    h.step()
    h.abort("slow")
    gate.set()
    h.run()
    assert not h.messages
    assert h.scheduler.num_adapters_on_device == 0
    _assert_nothing_is_kept(h)
    h.generate("again", make.prompt(5), adapter=slow, max_tokens=2)
    h.run()
    assert len(h.tokens("again")) == 2


def test_a_request_aborted_while_its_adapter_finds_no_room_leaves_nothing(harness, make):
    h = harness(num_adapter_slots=1)
    first, second = h.store(make.adapter(1)), h.store(make.adapter(2))
    h.generate("runs", make.prompt(5), adapter=first, max_tokens=60)
    h.run(until=lambda: h.tokens("runs"))
    h.generate("waits", make.prompt(5), adapter=second)
    h.run(until=lambda: not h.engine.awaits_background)
    assert h.engine._pager._fetched
    h.abort("waits")
    assert not h.engine._pager._fetched
    h.run()
    assert len(h.tokens("runs")) == 60
    _assert_nothing_is_kept(h)


def _assert_nothing_is_kept(h):
    pager = h.engine._pager
    assert [*pager._fetched, *pager._refs, *pager._num_requests] == []


@pytest.mark.parametrize("damage", ["missing", "truncated", "another", "away"])
def test_an_unreadable_adapter_fails_its_own_requests_alone(damage, harness, make):
    h = harness()
    good, bad, other = (h.store(make.adapter(seed)) for seed in (1, 2, 3))

    def read(blob):
        if blob != bad.weights_blob:
            return h.blobs.read(blob)
        if damage == "away":
            raise Unavailable("the store does not answer")
        if damage == "missing":
            raise KeyError(blob)
        content = h.blobs.read(other.weights_blob if damage == "another" else blob)
        return content if damage == "another" else content[:-100]

    damaged = harness(blobs=h.blobs, read=read)
    for i in range(3):
        damaged.generate(f"bad {i}", make.prompt(5), adapter=bad)
    damaged.generate("good", make.prompt(5), adapter=good)
    damaged.generate("base", make.prompt(5))
    damaged.run()
    failures = damaged.failures()
    assert set(failures) == {"bad 0", "bad 1", "bad 2"}
    expected = {"away": (503, "unavailable"), "truncated": (400, "invalid_adapter")}
    assert {(f.status, f.code) for f in failures.values()} == {
        expected.get(damage, (500, "adapter_fetch_failed"))
    }
    assert len(damaged.tokens("good")) == len(damaged.tokens("base")) == 12
    assert damaged.scheduler.kv_usage == 0


def test_a_failed_fetch_is_tried_again_by_the_next_request(harness, make):
    source = harness()
    adapter = source.store(make.adapter(1))
    is_away = [True]

    def read(blob):
        if is_away[0]:
            raise Unavailable("the store does not answer")
        return source.blobs.read(blob)

    h = harness(blobs=source.blobs, read=read)
    h.generate("first", make.prompt(5), adapter=adapter)
    h.run()
    assert h.failures()["first"].status == 503
    is_away[0] = False
    h.generate("second", make.prompt(5), adapter=adapter, max_tokens=3)
    h.run()
    assert len(h.tokens("second")) == 3


def test_an_adapter_larger_than_the_arena_is_refused_with_its_size(harness, make):
    h = harness(arena_elements=4096, num_adapter_slots=4)
    h.generate("large", make.prompt(5), adapter=h.store(make.adapter(1, rank=16)))
    h.generate("base", make.prompt(5))
    h.run()
    failure = h.failures()["large"]
    assert (failure.status, failure.code) == (400, "adapter_too_large")
    # 4096 float32 elements are 16 KiB, of which requests have half.
    assert "takes 0.08 MiB" in failure.message
    assert "at most 0.01 MiB of the adapter arena of 0.02 MiB" in failure.message
    assert "--adapter-arena-mb 1 or more" in failure.message
    assert len(h.tokens("base")) == 12


def test_a_job_whose_adapter_is_larger_than_jobs_may_pin_fails_with_the_remedy(harness, make):
    h = harness(arena_elements=4096, num_adapter_slots=4)
    h.start_job("large", make.dataset([9, 12]), make.spec())
    h.run()
    failure = h.ended("large")
    assert failure.code == "adapter_too_large"
    assert "a job's adapter may take at most 0.01 MiB" in failure.message
    assert "--adapter-arena-mb 1 or more" in failure.message


def test_requests_keep_the_version_that_they_started_with(harness, make, oracle):
    h = harness()
    old, new = make.adapter(1), make.adapter(2)
    prompt = make.prompt(6)
    h.generate("old", prompt, adapter=h.store(old), max_tokens=20)
    h.run(until=lambda: len(h.tokens("old")) >= 5)
    h.generate("new", prompt, adapter=h.store(new), max_tokens=20)
    h.run()
    assert h.tokens("old") == oracle.greedy(prompt, 20, old)
    assert h.tokens("new") == oracle.greedy(prompt, 20, new)


def test_answers_do_not_change_when_their_adapters_are_moved_together(harness, make, oracle):
    """An arena full of small adapters, some of which leave: a large one fits after moves alone."""
    small = [make.adapter(i, 1) for i in range(32)]
    size = small[0].num_elements
    large = make.adapter(90, 2)
    assert size < large.num_elements <= 2 * size
    h = harness(num_adapter_slots=64, arena_elements=32 * size, training_adapter_share=0.0)
    refs = [h.store(adapter) for adapter in small]
    for i, ref in enumerate(refs):
        h.generate(f"first {i}", make.prompt(5), adapter=ref, max_tokens=2)
    h.run()
    residency = h.scheduler._state.residency
    by_place = sorted(range(32), key=lambda i: residency.extents[refs[i].digest].start)
    small, refs = [small[i] for i in by_place], [refs[i] for i in by_place]
    for i in (3, 5, 7, 9):
        residency._evict(residency.entries[refs[i].digest])
    for i in (4, 6):
        h.generate(f"running {i}", make.prompt(6), adapter=refs[i], max_tokens=60)
    h.run(until=lambda: len(h.tokens("running 4")) > 3 and len(h.tokens("running 6")) > 3)
    h.generate("large", make.prompt(5), adapter=h.store(large), max_tokens=20)
    h.run()
    counters = h.engine.heartbeat().counters
    assert counters["adapter_moves"] > 0
    assert counters["adapter_evictions"] == 4
    assert h.tokens("large") == oracle.greedy(make.prompt(5), 20, large)
    for i in (4, 6):
        assert h.tokens(f"running {i}") == oracle.greedy(make.prompt(6), 60, small[i])
    for i in (0, 4, 6, 8, 31):
        h.generate(f"again {i}", make.prompt(5), adapter=refs[i], max_tokens=8)
    h.run()
    for i in (0, 4, 6, 8, 31):
        assert h.tokens(f"again {i}") == oracle.greedy(make.prompt(5), 8, small[i])
    assert h.engine.heartbeat().counters["adapter_loads"] == 33


def test_a_pinned_adapter_is_loaded_unasked_and_stays_through_a_flood_of_others(harness, make, oracle):
    fleet, pinned = _fleet(make)[:40], make.adapter(77, 2)
    shares = {"training_adapter_share": 0.25, "pinned_adapter_share": 0.25}
    h = harness(num_adapter_slots=8, arena_elements=2 * ELEMENTS_FOR_8, max_num_seqs=16, **shares)
    assert (h.ready.max_pinned_adapters, h.ready.pinned_arena_bytes) == (2, 2 * ELEMENTS_FOR_8 * 15 // 16)
    ref = h.store(pinned)
    h.engine.handle(SetPinnedAdapters([ref]))
    h.run()
    assert h.engine.heartbeat().gauges["num_adapters_pinned"] == 1
    assert h.engine.heartbeat().counters["adapter_requests_absent"] == 0
    for i, adapter in enumerate(fleet):
        h.generate(f"r{i}", make.prompt(5), adapter=h.store(adapter), max_tokens=3)
    h.run()
    loads = h.engine.heartbeat().counters["adapter_loads"]
    h.generate("pinned", make.prompt(6), adapter=ref, max_tokens=8)
    h.run()
    assert h.tokens("pinned") == oracle.greedy(make.prompt(6), 8, pinned)
    counters = h.engine.heartbeat().counters
    assert counters["adapter_loads"] == loads
    assert counters["adapter_requests_on_device"] == 1
    h.engine.handle(SetPinnedAdapters([]))
    for i, adapter in enumerate(fleet):
        h.generate(f"again {i}", make.prompt(5), adapter=h.store(adapter), max_tokens=3)
    h.run()
    assert h.scheduler.adapter_slot(ref.digest) is None
    _assert_nothing_is_kept(h)


def test_requests_are_counted_by_where_they_found_their_adapter(harness, make):
    h = harness(num_adapter_slots=1)
    refs = [h.store(make.adapter(i)) for i in (1, 2)]
    for name, ref in (("absent", refs[0]), ("device", refs[0]), ("other", refs[1]), ("host", refs[0])):
        h.generate(name, make.prompt(5), adapter=ref, max_tokens=2)
        h.run()
    counters = h.engine.heartbeat().counters
    found = [counters[f"adapter_requests_{where}"] for where in ("on_device", "on_host", "absent")]
    assert found == [1, 1, 2]
    assert counters["adapter_loads"] == 3
    assert counters["adapter_load_seconds"] > 0.0


def test_a_pin_beyond_the_room_leaves_the_others_alone_and_blocks_nobody(harness, make):
    shares = {"training_adapter_share": 0.25, "pinned_adapter_share": 0.25}
    h = harness(num_adapter_slots=8, arena_elements=2 * ELEMENTS_FOR_8, **shares)
    first, large = h.store(make.adapter(1, 4)), h.store(make.adapter(2, 16))
    h.engine.handle(SetPinnedAdapters([first, large]))
    h.run()
    assert h.scheduler.adapter_slot(first.digest) is not None
    assert h.scheduler.adapter_slot(large.digest) is None
    h.generate("base", make.prompt(5), max_tokens=2)
    h.generate("first", make.prompt(5), adapter=first, max_tokens=2)
    h.run()
    assert len(h.tokens("base")) == len(h.tokens("first")) == 2
