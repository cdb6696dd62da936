"""Which device an engine computes on."""

from __future__ import annotations

import pytest
import torch

from weft_server.engine.sizing import choose_device, use_device
from weft_server.errors import ConfigError


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that claims to have two, of which the second is the current one; yields what was chosen."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize(("name", "expected"), [("auto", 1), ("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_is_named_by_its_index_and_made_current(name, expected, two_gpus):
    device = choose_device(name)
    assert (device.type, device.index) == ("cuda", expected)
    use_device(device)
    assert two_gpus == [device]


def test_a_gpu_that_is_not_there_is_refused_with_the_number_there_is(two_gpus):
    with pytest.raises(ConfigError, match=r"'cuda:2'.* 2 CUDA"):
        choose_device("cuda:2")


def test_the_cpu_needs_no_current_device(two_gpus):
    use_device(choose_device("cpu"))
    assert two_gpus == []


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device cpu"):
        choose_device("cuda:0")
