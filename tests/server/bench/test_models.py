"""Random models: the same weights for Weft, for transformers and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from weft_server.bench.checkpoint import write_checkpoint
from weft_server.bench.models import RandomModel
from weft_server.bench.peers import adapter_name, add_adapters, build_peer, peer_gradients, why_absent
from weft_server.bench.shapes import SHAPES, Shape, read_shape
from weft_server.errors import ConfigError
from weft_server.model.loading import load_weights
from weft_server.model.rope import inverse_frequencies

CPU = torch.device("cpu")


def random_model(**changes: Any) -> RandomModel:
    shape = Shape("changed", {**SHAPES["tiny"], **changes})
    return RandomModel(shape, dtype=torch.float32, device=CPU, seed=1)


def family(name: str, **changes: Any) -> RandomModel:
    architectures = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
    return random_model(model_type=name, architectures=[architectures[name]], **changes)


@pytest.mark.parametrize(
    ("name", "changes"), [("llama", {}), ("qwen2", {"tie_word_embeddings": True}), ("qwen3", {})]
)
def test_names_and_shapes_are_those_of_transformers(name: str, changes: dict[str, Any]) -> None:
    model = family(name, **changes)
    peer = build_peer(model, "none")
    parameters = dict(peer.named_parameters())
    assert set(model.names()) == parameters.keys()
    for key in model.names():
        torch.testing.assert_close(parameters[key], model.tensor(key), rtol=0, atol=0)


def test_a_tensor_is_drawn_by_name_and_seed() -> None:
    model, other = random_model(), RandomModel(random_model().shape, dtype=torch.float32, device=CPU, seed=2)
    q, k = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(model.tensor(q), model.tensor(q))
    assert not torch.equal(model.tensor(q), model.tensor(k))
    assert not torch.equal(model.tensor(q), other.tensor(q))


def test_a_checkpoint_holds_the_same_model(tmp_path: Path) -> None:
    model = random_model()
    write_checkpoint(model, tmp_path)
    loaded = load_weights(
        tmp_path, model.config, device=CPU, dtype=torch.float32, quantization="none", low_memory=False
    )
    drawn = model.weft_weights("none")
    for ours, theirs in zip(drawn.layers, loaded.layers, strict=True):
        for a, b in zip(ours.linears, theirs.linears, strict=True):
            assert torch.equal(a.weight_dense(), b.weight_dense())
        assert torch.equal(ours.input_norm, theirs.input_norm)
        assert torch.equal(ours.post_attention_norm, theirs.post_attention_norm)
    assert torch.equal(drawn.lm_head, loaded.lm_head)
    ids = torch.arange(6).unsqueeze(0)
    from_disk = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(build_peer(model, "none")(ids).logits, from_disk(ids).logits)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("hello").input_ids


def test_adapters_differ_and_all_of_their_gradients_are_alive() -> None:
    model = random_model()
    adapters = [model.adapter(0), model.adapter(1)]
    peer = add_adapters(build_peer(model, "none"), adapters, [torch.float32, torch.bfloat16])
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        answers = [
            peer(input_ids=ids, adapter_names=[name]).logits
            for name in (adapter_name(0), adapter_name(1), adapter_name(None))
        ]
    assert all((a - b).abs().max() > 0.1 for a, b in ((answers[0], answers[1]), (answers[0], answers[2])))
    dtypes = {name: p.dtype for name, p in peer.named_parameters() if "lora_" in name}
    assert {d for name, d in dtypes.items() if f".{adapter_name(0)}." in name} == {torch.float32}
    assert {d for name, d in dtypes.items() if f".{adapter_name(1)}." in name} == {torch.bfloat16}
    peer.set_adapter(adapter_name(0))
    peer(input_ids=ids, labels=ids).loss.backward()
    gradient = peer_gradients(peer, adapters[0], adapter_name(0))
    for entry in adapters[0].layout:
        assert adapters[0].layout.a(gradient, entry.layer, entry.module).abs().max() > 0
        assert adapters[0].layout.b(gradient, entry.layer, entry.module).abs().max() > 0


def test_shapes_are_read_by_name_and_by_path(tmp_path: Path) -> None:
    assert read_shape("bench-1b").config.hidden_size == 2048
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for path in (tmp_path, tmp_path / "config.json"):
        assert read_shape(str(path)).name == tmp_path.name
    with pytest.raises(ConfigError, match=r"'bench-2b', neither a readable config\.json nor one of tiny,"):
        read_shape("bench-2b")


def test_rotations_are_those_of_the_shape() -> None:
    scaling = {"rope_scaling": SHAPES["llama-3.1-8b"]["rope_scaling"], "max_position_embeddings": 131072}
    model = random_model(**scaling)
    expected, _ = inverse_frequencies(model.config.rope, model.config.head_dim, 131072)
    torch.testing.assert_close(build_peer(model, "none").model.rotary_emb.inv_freq, expected)
    assert not torch.allclose(build_peer(random_model(), "none").model.rotary_emb.inv_freq, expected)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_one_that_weft_serves(name: str) -> None:
    config = read_shape(name).config
    assert config.num_heads * config.head_dim == config.hidden_size


def test_int8_has_no_peer() -> None:
    assert why_absent("none") is None
    assert why_absent("int8") == "no peer computes on int8 weights as Weft does"
