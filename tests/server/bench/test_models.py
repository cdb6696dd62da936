"""Random models: the same weights for Weft, for transformers and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from weft_kernels.lora import LoraTable
from weft_scheduler.plan import Segment, SegmentKind
from weft_server.bench.checkpoint import write_checkpoint
from weft_server.bench.models import RandomModel
from weft_server.bench.peers import adapter_name, add_adapters, build_peer, peer_gradients, why_absent
from weft_server.bench.shapes import SHAPES, Shape, read_shape
from weft_server.cache.kv import KvCache
from weft_server.engine.batch import build_batch
from weft_server.engine.sequence import Sequence
from weft_server.errors import ConfigError
from weft_server.model.decoder import Decoder
from weft_server.model.loading import load_weights
from weft_server.model.rope import inverse_frequencies
from weft_server.protocol import SamplingParams

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
    tensors = model.tensors()
    assert tensors.keys() == parameters.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(parameters[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_weft_and_transformers_give_the_same_logits(name: str) -> None:
    model = family(name)
    peer, decoder = build_peer(model, "none"), Decoder(model.weft_weights("none"), max_positions=16)
    ids = torch.randint(0, 512, (1, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(whole_sequence_logits(decoder, ids[0]), peer(ids).logits[0], rtol=0, atol=1e-4)


def whole_sequence_logits(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Of one sequence without an adapter, in one chunk."""
    config = decoder.config
    cache = KvCache(
        num_layers=config.num_layers,
        num_blocks=1,
        block_size=16,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
        device=CPU,
    )
    segment = Segment("0", SegmentKind.PREFILL, 0, len(ids), None, (0,))
    sequences = {"0": Sequence("0", ids.tolist(), SamplingParams(max_tokens=1), 0)}
    batch = build_batch([segment], sequences, {}, block_size=16, device=CPU)
    table = LoraTable(torch.zeros(64), 1, config.num_layers, 7)
    hidden, rotation = decoder.embed(ids), decoder.rotation(batch.tokens)
    for layer in range(config.num_layers):
        hidden, _ = decoder.forward_layer(layer, hidden, batch.tokens, cache, table, rotation)
    return decoder.logits(hidden)


def test_weights_depend_on_the_seed_alone() -> None:
    model, other = random_model(), RandomModel(random_model().shape, dtype=torch.float32, device=CPU, seed=2)
    q = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.tensors()[q], model.tensors()[q])
    assert not torch.equal(model.tensors()[q], other.tensors()[q])


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
