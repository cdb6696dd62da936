"""What is checked before loads are timed: that it notices an arena with other content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf

import pytest
import safetensors.torch
import torch
from torch import Tensor

from weft_server.adapters.image import HostImage
from weft_server.adapters.peft import write_peft
from weft_server.bench.adapters.route import AdapterFiles, Target, digest_of
from weft_server.bench.models import RandomModel
from weft_server.bench.shapes import read_shape

CPU = torch.device("cpu")


@pytest.fixture
def files() -> AdapterFiles:
    packed = RandomModel(read_shape("tiny"), dtype=torch.bfloat16, device=CPU).adapter(0, 4)
    return AdapterFiles(packed, *write_peft(packed, base_model_name="bench"))


@pytest.fixture
def target(files: AdapterFiles) -> Target:
    target = Target(read_shape("tiny").config, files.packed.num_elements, torch.bfloat16, CPU)
    target.poison()
    return target


def tensors_of(files: AdapterFiles) -> Mapping[str, Tensor]:
    return safetensors.torch.load(files.safetensors)


def test_the_right_adapter_differs_by_nothing(files: AdapterFiles, target: Target) -> None:
    target.load(HostImage.build(files.packed, torch.bfloat16))
    assert target.error(tensors_of(files)) == 0.0


def test_one_wrong_weight_is_noticed(files: AdapterFiles, target: Target) -> None:
    image = HostImage.build(files.packed, torch.bfloat16)
    image.weights[7] += 1.0
    target.load(image)
    assert target.error(tensors_of(files)) > 0.5


def test_what_a_load_leaves_out_is_noticed(files: AdapterFiles, target: Target) -> None:
    image = HostImage.build(files.packed, torch.bfloat16)
    target.load(image)
    target.clear()
    target.poison()
    target.load(replace(image, weights=image.weights[:-64]))
    assert target.error(tensors_of(files)) == inf


def test_a_module_that_the_table_lacks_is_noticed(files: AdapterFiles, target: Target) -> None:
    image = HostImage.build(files.packed, torch.bfloat16)
    target.load(replace(image, entries=image.entries[1:]))
    assert target.error(tensors_of(files)) == inf


def test_the_digest_that_is_timed_is_the_adapters_own(files: AdapterFiles) -> None:
    assert digest_of(files.packed, tensors_of(files)) == files.packed.digest
