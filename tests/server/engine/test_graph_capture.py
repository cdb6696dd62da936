"""Capturing at start: how much of it, within limits of time and memory."""

from __future__ import annotations

import gc
import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from weft_server.engine import graph_capture
from weft_server.engine.graph_capture import MAX_CAPTURE_S, capture_graphs

CPU = torch.device("cpu")


class _Device:
    """A device of which every capture takes 100 bytes and 7 seconds."""

    def __init__(self, error: Exception | None = None) -> None:
        self.captured: list[str] = []
        self.collects: list[bool] = []
        self.error = error
        self.graphs = SimpleNamespace(keys=tuple("abcdefghijkl"), capture=self.capture)

    def capture(self, key: str) -> None:
        self.captured.append(key)
        self.collects.append(gc.isenabled())
        if self.error is not None:
            raise self.error

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 10_000 - 100 * len(self.captured), 20_000

    def now(self) -> float:
        return 7.0 * len(self.captured)

    def run(self, max_bytes: int) -> str:
        with (
            mock.patch.object(torch.cuda, "synchronize"),
            mock.patch.object(torch.cuda, "mem_get_info", self.mem_get_info),
            mock.patch.object(graph_capture.time, "perf_counter", self.now),
        ):
            capture_graphs(self.graphs, CPU, max_bytes=max_bytes)
        return "".join(self.captured)


@pytest.mark.parametrize(("max_bytes", "expected"), [(0, ""), (1, "a"), (300, "abc"), (301, "abcd")])
def test_capturing_ends_when_its_memory_is_spent(max_bytes: int, expected: str) -> None:
    assert _Device().run(max_bytes) == expected


def test_capturing_ends_when_its_time_is_over() -> None:
    assert MAX_CAPTURE_S == 60.0
    assert _Device().run(1 << 30) == "abcdefghi"


def test_garbage_is_collected_before_and_not_during_captures() -> None:
    device = _Device()
    device.run(500)
    assert device.collects == list(itertools.repeat(False, 5))
    assert gc.isenabled()


def test_a_failed_capture_is_an_error_and_garbage_is_collected_again() -> None:
    with pytest.raises(RuntimeError, match="no capture"):
        _Device(RuntimeError("no capture")).run(500)
    assert gc.isenabled()
