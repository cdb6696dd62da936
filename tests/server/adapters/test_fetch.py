"""Fetching in the background: results, failures, and that nothing blocks the caller."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

from weft_server.adapters.errors import AdapterError, AdapterFetchFailed
from weft_server.adapters.fetch import AdapterFetcher, CheckResult, FetchResult
from weft_server.adapters.host_cache import HostCache
from weft_server.adapters.packed import PackedAdapter, new_adapter
from weft_server.adapters.peft import write_peft
from weft_server.errors import Unavailable
from weft_server.protocol import AdapterRef

SHAPES = {"q_proj": (32, 48)}


class Blobs:
    """An in-memory blob store that can fail and can be held."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.failures: dict[str, Exception] = {}
        self.num_reads: Counter[str] = Counter()
        self.gate = threading.Event()
        self.gate.set()
        self.reading = threading.Semaphore(0)

    def read(self, blob: str) -> bytes:
        self.num_reads[blob] += 1
        self.reading.release()
        assert self.gate.wait(30)
        if blob in self.failures:
            raise self.failures[blob]
        return self.content[blob]

    def store(self, name: str, packed: PackedAdapter) -> AdapterRef:
        config_json, weights = write_peft(packed, base_model_name="base")
        self.content |= {f"{name}.json": config_json, f"{name}.bin": weights}
        return AdapterRef(packed.digest, f"{name}.json", f"{name}.bin", len(weights))


def _adapter(seed: int) -> PackedAdapter:
    return new_adapter(
        rank=4,
        alpha=8,
        dropout=0.0,
        target_modules=("q_proj",),
        use_rslora=False,
        num_layers=2,
        shapes=SHAPES,
        seed=seed,
    )


@pytest.fixture
def blobs() -> Blobs:
    return Blobs()


@pytest.fixture
def cache() -> HostCache:
    return HostCache(1 << 20)


@pytest.fixture
def fetcher(blobs: Blobs, cache: HostCache) -> Iterator[AdapterFetcher]:
    fetcher = AdapterFetcher(blobs.read, cache, num_layers=2, shapes=SHAPES, dtype=torch.bfloat16)
    yield fetcher
    blobs.gate.set()
    fetcher.close()


def _poll(poll: Callable[[], list], count: int) -> list:
    results, ticks = [], threading.Event()
    for _ in range(3000):
        results += poll()
        if len(results) >= count:
            return results
        ticks.wait(0.01)
    raise AssertionError(f"only {results} came")


def test_a_fetched_adapter_is_cast_cached_and_reported_once(fetcher, blobs, cache):
    packed = _adapter(1)
    fetcher.submit(blobs.store("one", packed))
    (result,) = _poll(fetcher.completed, 1)
    assert result.digest == packed.digest
    assert result.error is None
    assert torch.equal(result.image.weights, packed.weights.bfloat16())
    assert cache.try_get(packed.digest) is result.image
    assert fetcher.completed() == []


def test_a_cached_adapter_is_not_read_again(fetcher, blobs):
    ref = blobs.store("one", _adapter(1))
    fetcher.submit(ref)
    (first,) = _poll(fetcher.completed, 1)
    fetcher.submit(ref)
    (second,) = fetcher.completed()
    assert second.image is first.image
    assert blobs.num_reads["one.bin"] == 1


def test_neither_submitting_nor_polling_waits_and_a_fetch_under_way_is_not_repeated(fetcher, blobs):
    blobs.gate.clear()
    ref = blobs.store("one", _adapter(1))
    fetcher.submit(ref)
    fetcher.submit(ref)
    assert blobs.reading.acquire(timeout=30)
    fetcher.submit(ref)
    assert fetcher.completed() == []
    blobs.gate.set()
    assert len(_poll(fetcher.completed, 1)) == 1
    assert blobs.num_reads["one.bin"] == 1


def test_one_failing_fetch_does_not_touch_the_others(fetcher, blobs, cache):
    good, bad = blobs.store("good", _adapter(1)), blobs.store("bad", _adapter(2))
    away, lost = blobs.store("away", _adapter(3)), blobs.store("lost", _adapter(4))
    blobs.content["bad.bin"] = blobs.content["bad.bin"][:-4]
    blobs.failures["away.bin"] = Unavailable("the store is away", retry_after_s=1.0)
    del blobs.content["lost.json"]
    for ref in (bad, away, lost, good):
        fetcher.submit(ref)
    results: dict[str, FetchResult] = {r.digest: r for r in _poll(fetcher.completed, 4)}
    assert results[good.digest].image is not None
    assert isinstance(results[bad.digest].error, AdapterError)
    assert results[away.digest].error is blobs.failures["away.bin"]
    assert isinstance(results[lost.digest].error, AdapterFetchFailed)
    assert "KeyError" in results[lost.digest].error.message
    assert all(results[ref.digest].image is None for ref in (bad, away, lost))
    assert len(cache) == 1


def test_a_failed_fetch_can_be_tried_again(fetcher, blobs):
    ref = blobs.store("one", _adapter(1))
    blobs.failures["one.bin"] = Unavailable("the store is away")
    fetcher.submit(ref)
    (failed,) = _poll(fetcher.completed, 1)
    assert failed.error is not None
    blobs.failures.clear()
    fetcher.submit(ref)
    (result,) = _poll(fetcher.completed, 1)
    assert result.image is not None


def test_content_that_is_not_what_the_digest_says_is_refused(fetcher, blobs, cache):
    ref = blobs.store("one", _adapter(1))
    blobs.store("one", _adapter(2))
    fetcher.submit(ref)
    (result,) = _poll(fetcher.completed, 1)
    assert isinstance(result.error, AdapterFetchFailed)
    assert ref.digest in result.error.message
    assert len(cache) == 0


def test_an_image_that_does_not_fit_the_cache_is_still_delivered(blobs):
    small = HostCache(16)
    fetcher = AdapterFetcher(blobs.read, small, num_layers=2, shapes=SHAPES, dtype=torch.float32)
    fetcher.submit(blobs.store("one", _adapter(1)))
    (result,) = _poll(fetcher.completed, 1)
    assert result.image is not None
    assert len(small) == 0
    fetcher.close()


def test_an_upload_is_checked_without_being_kept(fetcher, blobs, cache):
    packed = _adapter(1)
    ref = blobs.store("one", packed)
    fetcher.submit_check("c1", ref.config_blob, ref.weights_blob)
    (result,) = _poll(fetcher.checked, 1)
    assert result.check_id == "c1"
    assert result.error is None
    assert result.summary.digest == packed.digest
    assert result.summary.target_modules == ("q_proj",)
    assert (result.summary.max_rank, result.summary.num_parameters) == (4, packed.num_parameters)
    assert result.summary.num_elements == packed.num_elements
    assert result.summary.weights_bytes == ref.weights_bytes
    assert len(cache) == 0
    assert fetcher.completed() == []


def test_a_bad_upload_is_refused_with_its_reason(fetcher, blobs):
    ref = blobs.store("one", _adapter(1))
    blobs.content["one.json"] = blobs.content["one.json"].replace(b'"use_dora": false', b'"use_dora": true')
    fetcher.submit_check("c1", ref.config_blob, ref.weights_blob)
    results: list[CheckResult] = _poll(fetcher.checked, 1)
    assert results[0].summary is None
    assert "DoRA" in results[0].error.message
    assert results[0].error.status == 400


def test_closing_drops_what_has_not_begun(blobs):
    blobs.gate.clear()
    fetcher = AdapterFetcher(
        blobs.read, HostCache(1 << 20), num_layers=2, shapes=SHAPES, dtype=torch.float32, num_threads=1
    )
    fetcher.submit(blobs.store("one", _adapter(1)))
    assert blobs.reading.acquire(timeout=30)
    fetcher.submit(blobs.store("two", _adapter(2)))
    closing = threading.Thread(target=fetcher.close)
    closing.start()
    _poll(lambda: [True] if fetcher._closed.is_set() else [], 1)
    blobs.gate.set()
    closing.join(30)
    assert not closing.is_alive()
    assert blobs.num_reads["two.json"] == 0
    assert len(fetcher.completed()) == 1


def test_a_check_that_takes_long_keeps_no_request_waiting_for_its_adapter(blobs, cache):
    reads, held, read = [], threading.Event(), blobs.read

    def slow_for_uploads(blob: str) -> bytes:
        reads.append(blob)
        if blob.startswith("upload"):
            assert held.wait(30)
        return read(blob)

    fetcher = AdapterFetcher(slow_for_uploads, cache, num_layers=2, shapes=SHAPES, dtype=torch.float32)
    wanted = blobs.store("one", _adapter(1))
    for i in range(3):
        upload = blobs.store(f"upload{i}", _adapter(2 + i))
        fetcher.submit_check(f"c{i}", upload.config_blob, upload.weights_blob)
    fetcher.submit(wanted)
    (result,) = _poll(fetcher.completed, 1)
    assert result.image is not None
    assert fetcher.checked() == []
    held.set()
    assert [check.check_id for check in _poll(fetcher.checked, 3)] == ["c0", "c1", "c2"]
    fetcher.close()
