"""The digest: what it covers and what it must not depend on."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft_server.adapters.errors import AdapterError
from weft_server.adapters.image import HostImage
from weft_server.adapters.packed import PackedAdapter, new_adapter, repack
from weft_server.adapters.peft import read_peft

SHAPES = {"q_proj": (16, 24), "k_proj": (16, 8), "down_proj": (40, 16)}
PARENTS = {"q_proj": "self_attn", "k_proj": "self_attn", "down_proj": "mlp"}


def _files(
    ranks: dict[str, int], alpha: float, seed: int, *, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for module, rank in ranks.items():
            path = f"model.layers.{layer}.{PARENTS[module]}.{module}"
            num_in, num_out = SHAPES[module]
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, num_in, generator=generator).to(dtype)
            tensors[f"{path}.lora_B.weight"] = torch.randn(num_out, rank, generator=generator).to(dtype)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": alpha,
        "target_modules": list(ranks),
        "rank_pattern": dict(ranks),
    }
    return config, tensors


def _read(config: dict[str, object], tensors: dict[str, torch.Tensor]) -> PackedAdapter:
    return read_peft(
        json.dumps(config).encode(), safetensors.torch.save(tensors), num_layers=2, shapes=SHAPES
    )


RANKS = st.dictionaries(st.sampled_from(list(SHAPES)), st.integers(1, 9), min_size=1)


@settings(max_examples=40, deadline=None)
@given(ranks=RANKS, alpha=st.integers(1, 64), seed=st.integers(0, 99), data=st.data())
def test_the_digest_is_the_same_however_the_adapter_is_written_down(ranks, alpha, seed, data):
    config, tensors = _files(ranks, alpha, seed)
    digest = _read(config, tensors).digest
    names = data.draw(st.permutations(list(tensors)))
    infix = data.draw(st.sampled_from(["", ".default", ".x"]))
    prefix = data.draw(st.sampled_from(["", "base_model.model."]))
    shuffled = {prefix + name.replace(".weight", f"{infix}.weight"): tensors[name] for name in names}
    by_path = {
        f"model.layers.{layer}.{PARENTS[module]}.{module}": rank
        for layer in range(2)
        for module, rank in ranks.items()
    }
    respelled = config | {
        "target_modules": data.draw(st.sampled_from([list(by_path), "|".join(f".*{m}" for m in ranks)])),
        "rank_pattern": by_path,
        "alpha_pattern": {".*_proj": alpha},
        "lora_alpha": 1,
        "lora_dropout": 0.5,
        "base_model_name_or_path": "renamed",
    }
    assert _read(respelled, shuffled).digest == digest


@settings(max_examples=30, deadline=None)
@given(ranks=RANKS, alpha=st.integers(1, 64), seed=st.integers(0, 99), data=st.data())
def test_the_digest_changes_with_scale_weights_and_precision(ranks, alpha, seed, data):
    config, tensors = _files(ranks, alpha, seed)
    digest = _read(config, tensors).digest
    assert _read(config | {"lora_alpha": alpha + 1}, tensors).digest != digest
    name = data.draw(st.sampled_from(sorted(tensors)))
    changed = tensors[name].clone()
    changed.view(-1)[data.draw(st.integers(0, changed.numel() - 1))] += 1
    assert _read(config, tensors | {name: changed}).digest != digest
    assert _read(config, tensors | {name: tensors[name].double()}).digest != digest
    if any(rank > 1 for rank in ranks.values()):
        assert _read(config | {"use_rslora": True}, tensors).digest != digest


def test_the_digest_changes_with_the_targets_even_if_all_weights_are_zero():
    def digest(ranks: dict[str, int]) -> str:
        config, tensors = _files(ranks, 8, 0)
        return _read(config, {name: torch.zeros_like(t) for name, t in tensors.items()}).digest

    assert len({digest({"q_proj": 2}), digest({"k_proj": 2}), digest({"q_proj": 2, "k_proj": 2})}) == 3


def test_repacking_the_same_weights_keeps_the_digest_and_ignores_padding():
    config, tensors = _files({"q_proj": 3, "down_proj": 5}, 8, 1)
    packed = _read(config, tensors)
    dirty = packed.weights.clone()
    used = torch.zeros_like(dirty, dtype=torch.bool)
    for entry in packed.layout:
        packed.layout.a(used, entry.layer, entry.module).fill_(True)
        packed.layout.b(used, entry.layer, entry.module).fill_(True)
    assert not used.all()
    dirty[~used] = torch.nan
    again = repack(packed, dirty)
    assert again.digest == packed.digest
    assert torch.equal(again.weights, packed.weights)


def test_repacking_a_vector_of_another_length_is_refused():
    packed = _read(*_files({"q_proj": 3}, 8, 1))
    with pytest.raises(ValueError, match="elements"):
        repack(packed, torch.zeros(packed.num_elements + 1))


def test_sizes_are_reported():
    packed = _read(*_files({"q_proj": 3, "down_proj": 5}, 8, 1))
    assert packed.max_rank == 5
    assert packed.target_modules == ("q_proj", "down_proj")
    assert packed.num_parameters == 2 * (3 * (16 + 24) + 5 * (40 + 16))
    assert packed.num_elements == packed.weights.numel()


def test_weights_beyond_the_arenas_range_are_refused_instead_of_becoming_infinite():
    config, tensors = _files({"q_proj": 3}, 8, 1)
    name = next(iter(tensors))
    tensors[name] = tensors[name] * 0 + 1e6
    packed = _read(config, tensors)
    with pytest.raises(AdapterError, match="1e\\+06"):
        HostImage.build(packed, torch.float16)
    assert HostImage.build(packed, torch.bfloat16).nbytes == 2 * packed.num_elements


def test_scales_are_per_module():
    fresh = new_adapter(
        rank=4,
        alpha=6,
        dropout=0.0,
        target_modules=("q_proj",),
        use_rslora=True,
        num_layers=2,
        shapes=SHAPES,
        seed=-5,
    )
    assert fresh.scales == {(0, "q_proj"): 3.0, (1, "q_proj"): 3.0}
