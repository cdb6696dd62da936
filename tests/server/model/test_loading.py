"""Loading model directories that transformers and bitsandbytes wrote; their tensors are the oracle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft_kernels.prepacked import can_prepack
from weft_server.model.config import MODULES, ModelConfig, ModelError
from weft_server.model.fingerprint import base_fingerprint
from weft_server.model.loading import Quantization, load_weights
from weft_server.model.random import random_weights
from weft_server.model.weights import DecoderWeights, LayerWeights
from weft_server.quant import nf4
from weft_server.quant.linear import QuantizedLinear

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

CPU = torch.device("cpu")
FAMILIES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
FUSED = {"qkv": MODULES[:3], "o": MODULES[3:4], "gate_up": MODULES[4:6], "down": MODULES[6:]}


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    shape: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](**{**shape, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    return model.to(dtype)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Saves a tiny random model and returns (directory, model)."""

    def save(family: str = "llama", *, shard: str = "1GB", **changes: Any) -> tuple[Path, Any]:
        model = tiny_model(family, **changes)
        model.save_pretrained(tmp_path, max_shard_size=shard)
        return tmp_path, model

    return save


def load(
    path: Path,
    quantization: Quantization = "none",
    dtype: torch.dtype = torch.float32,
    *,
    low_memory: bool = False,
) -> DecoderWeights:
    config = ModelConfig.from_directory(path)
    return load_weights(
        path, config, device=CPU, dtype=dtype, quantization=quantization, low_memory=low_memory
    )


def hf_modules(model: Any, layer: int) -> dict[str, Any]:
    block = model.model.layers[layer]
    return {
        module: getattr(
            block.mlp if module in ("gate_proj", "up_proj", "down_proj") else block.self_attn, module
        )
        for module in MODULES
    }


def fused_linears(layer: LayerWeights) -> dict[str, QuantizedLinear]:
    return dict(zip(FUSED, layer.linears, strict=True))


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path: Path, **changes: Any) -> None:
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, **changes}))


def assert_equals_model(weights: DecoderWeights, model: Any) -> None:
    assert torch.equal(weights.embed, model.model.embed_tokens.weight.to(weights.dtype))
    assert torch.equal(weights.lm_head, model.lm_head.weight.to(weights.dtype))
    assert torch.equal(weights.norm, model.model.norm.weight.to(weights.dtype))
    assert len(weights.layers) == len(model.model.layers)
    for index, layer in enumerate(weights.layers):
        block, modules = model.model.layers[index], hf_modules(model, index)
        assert torch.equal(layer.input_norm, block.input_layernorm.weight.to(weights.dtype))
        assert torch.equal(layer.post_attention_norm, block.post_attention_layernorm.weight.to(weights.dtype))
        for ours, name in ((layer.q_norm, "q_norm"), (layer.k_norm, "k_norm")):
            theirs = getattr(block.self_attn, name, None)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert torch.equal(ours, theirs.weight.to(weights.dtype))
        for group, linear in fused_linears(layer).items():
            parts = [modules[module] for module in FUSED[group]]
            assert torch.equal(linear.weight_dense(), torch.cat([p.weight for p in parts]).to(weights.dtype))
            biases = [p.bias for p in parts if p.bias is not None]
            assert (linear.bias is not None) == bool(biases)
            if linear.bias is not None:
                assert torch.equal(linear.bias, torch.cat(biases).to(weights.dtype))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_family_loads_with_the_tensors_of_transformers(
    family: str, tied: bool, saved: Callable[..., tuple[Path, Any]]
) -> None:
    path, model = saved(family, tie_word_embeddings=tied)
    weights = load(path)
    assert_equals_model(weights, model)
    assert (weights.lm_head is weights.embed) == tied
    parameters = {p.data_ptr(): p.nbytes for p in model.parameters()}
    assert weights.num_bytes == sum(parameters.values())


def test_biases_of_every_module_are_loaded(saved: Callable[..., tuple[Path, Any]]) -> None:
    path, model = saved("llama", attention_bias=True, mlp_bias=True)
    assert_equals_model(load(path), model)


def test_sharded_files_load_alike(saved: Callable[..., tuple[Path, Any]]) -> None:
    path, model = saved("qwen2", shard="40KB")
    assert len(list(path.glob("model-*.safetensors"))) > 3
    assert_equals_model(load(path), model)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tensors_are_cast_to_the_compute_dtype(
    stored: torch.dtype, dtype: torch.dtype, saved: Callable[..., tuple[Path, Any]]
) -> None:
    path, model = saved("qwen3", dtype=stored)
    assert_equals_model(load(path, dtype=dtype), model)


def test_loaded_tensors_outlive_the_files(saved: Callable[..., tuple[Path, Any]]) -> None:
    path, model = saved()
    weights = load(path)
    (path / "model.safetensors").write_bytes(b"\0" * (path / "model.safetensors").stat().st_size)
    assert_equals_model(weights, model)


@pytest.mark.parametrize("drop", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_matrix_may_be_stored_under_either_name(
    drop: str, saved: Callable[..., tuple[Path, Any]]
) -> None:
    path, model = saved(tie_word_embeddings=True)

    def store_once(tensors: dict[str, Tensor]) -> None:
        both = ("lm_head.weight", "model.embed_tokens.weight")
        matrix = next(tensors[name] for name in both if name in tensors)
        tensors.update({name: matrix.clone() for name in both})
        del tensors[drop]

    fingerprint = base_fingerprint(path)
    edit_tensors(path, store_once)
    assert_equals_model(load(path), model)
    assert base_fingerprint(path) == fingerprint


def test_a_tied_matrix_stored_twice_must_agree(saved: Callable[..., tuple[Path, Any]]) -> None:
    path, model = saved(tie_word_embeddings=False)
    edit_config(path, tie_word_embeddings=True)
    with pytest.raises(ModelError, match="differ"):
        load(path)
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    weights = load(path)
    assert weights.lm_head is weights.embed
    assert torch.equal(weights.embed, model.model.embed_tokens.weight)


def test_stored_rotary_frequencies_of_old_checkpoints_are_ignored(
    saved: Callable[..., tuple[Path, Any]],
) -> None:
    path, model = saved()
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    edit_tensors(path, lambda tensors: tensors.update({name: torch.ones(16) for name in names}))
    assert_equals_model(load(path), model)


def test_the_published_tinystories_model_loads() -> None:
    root = os.environ.get("WEFT_TEST_DATA")
    if not root:
        pytest.skip("WEFT_TEST_DATA is not set")
    path = Path(root) / "models" / "tinystories-656k"
    weights = load(path)
    assert weights.lm_head is weights.embed
    assert_equals_model(weights, transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_low_memory_keeps_weights_packed_with_the_same_values(
    quantization: Quantization, family: str, saved: Callable[..., tuple[Path, Any]]
) -> None:
    path, _ = saved(family)
    expanded, packed = load(path, quantization), load(path, quantization, low_memory=True)
    assert packed.num_bytes < expanded.num_bytes
    for ours, theirs in zip(expanded.layers, packed.layers, strict=True):
        for group, linear in fused_linears(ours).items():
            low = fused_linears(theirs)[group]
            assert (linear.format, low.format) == (quantization, quantization)
            assert linear.is_expanded
            assert not low.is_expanded
            assert torch.equal(linear.weight_dense(), low.weight_dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_quantizes_decoder_linears_as_bitsandbytes_and_nothing_else(
    dtype: torch.dtype, saved: Callable[..., tuple[Path, Any]]
) -> None:
    path, model = saved("qwen2", hidden_size=128, intermediate_size=256)
    weights = load(path, "auto", dtype)
    assert torch.equal(weights.embed, model.model.embed_tokens.weight.to(dtype))
    assert torch.equal(weights.lm_head, model.lm_head.weight.to(dtype))
    for index, layer in enumerate(weights.layers):
        modules = hf_modules(model, index)
        for group, linear in fused_linears(layer).items():
            parts = []
            for module in FUSED[group]:
                weight = modules[module].weight.detach().to(dtype)
                codes, state = bnb.functional.quantize_4bit(
                    weight, quant_type="nf4", compress_statistics=True
                )
                state.absmax = nf4.quantize(
                    weight
                ).absmax_codes  # see test_nf4: its CPU library's lookup table
                parts.append(bnb.functional.dequantize_4bit(codes, state))
            assert linear.format == "nf4"
            assert torch.equal(linear.weight_dense(), torch.cat(parts))


BNB_VARIANTS: dict[str, dict[str, Any]] = {
    "nested": {"bnb_4bit_use_double_quant": True},
    "plain": {"bnb_4bit_use_double_quant": False},
    "bf16-storage": {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.bfloat16},
    "skip": {
        "llm_int8_skip_modules": [
            "lm_head",
            "model.layers.1.mlp.down_proj",
            "model.layers.0.self_attn.k_proj",
        ]
    },
}


@pytest.fixture
def prequantized(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Saves a tiny model that transformers and bitsandbytes quantize; returns (directory, that model)."""

    def save(family: str = "qwen2", **options: Any) -> tuple[Path, Any]:
        tiny_model(family, dtype=torch.bfloat16, hidden_size=128).save_pretrained(tmp_path / "plain")
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", **options}
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "plain", quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(tmp_path / "quantized")
        return tmp_path / "quantized", model

    return save


def bnb_dense(module: Any) -> Tensor:
    if isinstance(module, bnb.nn.Linear4bit):
        dense: Tensor = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        return dense
    return module.weight.detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("variant", sorted(BNB_VARIANTS))
@pytest.mark.parametrize("low_memory", [False, True], ids=["expanded", "packed"])
def test_a_checkpoint_quantized_by_bitsandbytes_loads_bit_exact(
    variant: str, low_memory: bool, prequantized: Callable[..., tuple[Path, Any]]
) -> None:
    path, model = prequantized(**BNB_VARIANTS[variant])
    weights = load(path, "auto", torch.bfloat16, low_memory=low_memory)
    num_packed = 0
    for index, layer in enumerate(weights.layers):
        modules = hf_modules(model, index)
        for group, linear in fused_linears(layer).items():
            expected = torch.cat([bnb_dense(modules[module]) for module in FUSED[group]])
            assert torch.equal(linear.weight_dense(), expected)
            num_packed += linear.packed is not None
    assert num_packed == (0 if not low_memory else 6 if variant == "skip" else 8)
    assert torch.equal(weights.lm_head, model.lm_head.weight)


def test_a_quantized_checkpoint_given_none_is_expanded(
    prequantized: Callable[..., tuple[Path, Any]],
) -> None:
    path, model = prequantized()
    weights = load(path, "none", torch.float32, low_memory=True)
    down = weights.layers[1].down
    assert down.packed is None
    assert torch.equal(down.weight_dense(), bnb_dense(hf_modules(model, 1)["down_proj"]).float())


def test_a_quantized_checkpoint_is_not_quantized_again(prequantized: Callable[..., tuple[Path, Any]]) -> None:
    path, _ = prequantized()
    with pytest.raises(ModelError, match="NF4 already"):
        load(path, "int8")


def test_fp4_checkpoints_are_refused_by_name(prequantized: Callable[..., tuple[Path, Any]]) -> None:
    path, _ = prequantized(bnb_4bit_quant_type="fp4")
    with pytest.raises(ModelError, match="fp4"):
        load(path, "auto")
    content = json.loads((path / "config.json").read_text())["quantization_config"]
    edit_config(path, quantization_config={**content, "bnb_4bit_quant_type": "nf4"})
    with pytest.raises(ModelError, match="fp4"):
        load(path, "auto")


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8-bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4"),
        ({"bits": 4}, "None"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_other_quantization_methods_are_refused_by_name(
    quantization: dict[str, Any], named: str, saved: Callable[..., tuple[Path, Any]]
) -> None:
    path, _ = saved()
    edit_config(path, quantization_config=quantization)
    with pytest.raises(ModelError, match=named):
        load(path, "auto")


KEY = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(KEY), f"missing.*{KEY}"),
        (lambda t: t.pop("model.norm.weight"), r"missing.*model\.norm\.weight"),
        (lambda t: t.pop("lm_head.weight"), r"missing.*lm_head\.weight"),
        (lambda t: t.update({"model.layers.2.extra": torch.ones(1)}), r"not expected.*layers\.2\.extra"),
        (lambda t: t.update({KEY[:-6] + "bias": torch.ones(64)}), r"not expected.*down_proj\.bias"),
        (lambda t: t.update({KEY: t[KEY].T.contiguous()}), f"{KEY} has shape.*128, 64"),
        (lambda t: t.update({KEY: t[KEY].to(torch.int8)}), f"{KEY} is torch.int8"),
        (lambda t: t[KEY].fill_(float("nan")), f"{KEY}.*not finite"),
    ],
    ids=["absent", "no-norm", "no-head", "extra", "extra-bias", "shape", "dtype", "nan"],
)
def test_a_wrong_tensor_is_refused_by_name(
    edit: Callable[[dict[str, Tensor]], object], message: str, saved: Callable[..., tuple[Path, Any]]
) -> None:
    path, _ = saved()
    edit_tensors(path, edit)
    with pytest.raises(ModelError, match=message):
        load(path, "nf4")


def replace_tensor(suffix: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({KEY + suffix: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(KEY + ".nested_absmax"), "nested_absmax is missing"),
        (replace_tensor(".absmax", torch.zeros(3, dtype=torch.uint8)), "absmax"),
        (replace_tensor(".quant_map", torch.zeros(8)), "quant_map"),
        (replace_tensor("", torch.zeros(10, 1, dtype=torch.uint8)), "too few"),
        (replace_tensor(".quant_state.bitsandbytes__nf4", torch.zeros(3, dtype=torch.uint8)), "JSON"),
    ],
    ids=["absent", "absmax", "map", "short", "state"],
)
def test_a_damaged_quantized_tensor_is_refused_by_name(
    edit: Callable[[dict[str, Tensor]], object],
    message: str,
    prequantized: Callable[..., tuple[Path, Any]],
) -> None:
    path, _ = prequantized(bnb_4bit_use_double_quant=True)
    edit_tensors(path, edit)
    with pytest.raises(ModelError, match=message) as error:
        load(path, "auto")
    assert KEY in str(error.value)


def test_a_quantized_tensor_of_another_shape_is_refused(
    prequantized: Callable[..., tuple[Path, Any]],
) -> None:
    path, _ = prequantized()
    edit_config(path, intermediate_size=192)
    with pytest.raises(ModelError, match="has shape"):
        load(path, "auto")


def test_a_directory_without_safetensors_says_what_is_there(tmp_path: Path) -> None:
    config = ModelConfig.from_dict(tiny_model().config.to_dict())

    def attempt(path: Path) -> None:
        load_weights(path, config, device=CPU, dtype=torch.float32)

    with pytest.raises(ModelError, match="not a directory"):
        attempt(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"neither model\.safetensors"):
        attempt(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: pickle files are never loaded"):
        attempt(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="adapter's directory"):
        attempt(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        attempt(tmp_path)


def test_truncated_files_are_refused(saved: Callable[..., tuple[Path, Any]]) -> None:
    path, _ = saved()
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        load(path)


def test_a_missing_or_misplaced_shard_is_refused_by_name(saved: Callable[..., tuple[Path, Any]]) -> None:
    path, _ = saved(shard="40KB")
    index_file = path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shards = sorted(set(index["weight_map"].values()))

    moved = {**index["weight_map"], "model.norm.weight": shards[0]}
    if index["weight_map"]["model.norm.weight"] == shards[0]:
        moved["model.norm.weight"] = shards[-1]
    index_file.write_text(json.dumps({**index, "weight_map": moved}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        load(path)
    index_file.write_text(json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}}))
    with pytest.raises(ModelError, match="no safetensors file here"):
        load(path)
    index_file.write_text(json.dumps({}))
    with pytest.raises(ModelError, match="weight_map"):
        load(path)
    index_file.write_text(json.dumps(index))
    (path / shards[1]).unlink()
    with pytest.raises(ModelError, match=shards[1]):
        load(path)


def test_the_fingerprint_is_of_values_and_architecture_not_of_files(
    saved: Callable[..., tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, model = saved()
    fingerprint = base_fingerprint(path)
    sharded = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(sharded, max_shard_size="40KB")
    assert base_fingerprint(sharded) == fingerprint
    edit_config(path, eos_token_id=5, max_position_embeddings=64)
    assert base_fingerprint(path) == fingerprint
    edit_config(path, rms_norm_eps=1e-3)
    assert base_fingerprint(path) != fingerprint
    edit_config(sharded, torch_dtype="float16")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    model.save_pretrained(sharded, max_shard_size="40KB")
    assert base_fingerprint(sharded) != fingerprint


def test_a_sampled_fingerprint_still_tells_finetuned_bases_apart(
    saved: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft_server.model.fingerprint._FULL_DIGEST_BYTES", 1)
    monkeypatch.setattr("weft_server.model.fingerprint._SAMPLE_BYTES", 64)
    path, _ = saved()
    fingerprint = base_fingerprint(path)
    assert base_fingerprint(path) == fingerprint
    edit_tensors(path, lambda tensors: tensors[KEY].mul_(1.001))
    assert base_fingerprint(path) != fingerprint


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_random_weights_have_the_shapes_of_loaded_ones_and_follow_the_seed(
    family: str, quantization: Quantization, saved: Callable[..., tuple[Path, Any]]
) -> None:
    path, _ = saved(family)
    config = ModelConfig.from_directory(path)
    loaded = load(path, quantization)

    def draw(seed: int) -> DecoderWeights:
        return random_weights(config, seed=seed, dtype=torch.float32, device=CPU, quantization=quantization)

    first = draw(1)
    assert first.num_bytes == loaded.num_bytes
    assert [repr(linear) for linear in first.layers[1].linears] == [
        repr(linear) for linear in loaded.layers[1].linears
    ]
    assert base_fingerprint(first) == base_fingerprint(draw(1)) != base_fingerprint(draw(2))
    assert torch.equal(first.layers[1].down.weight_dense(), draw(1).layers[1].down.weight_dense())


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_on_a_cpu_weights_in_bf16_are_laid_out_unless_memory_is_low(
    quantization: Quantization, saved: Callable[..., tuple[Path, Any]]
) -> None:
    if not can_prepack(torch.device("cpu"), torch.bfloat16):
        pytest.skip("this machine's library lays no weights out")
    path, _ = saved("llama")
    config = ModelConfig.from_directory(path)
    given: dict[str, Any] = {"device": CPU, "dtype": torch.bfloat16, "quantization": quantization}
    fast, low = (load_weights(path, config, **given, low_memory=is_low) for is_low in (False, True))
    assert repr(random_weights(config, seed=1, **given).layers[0].qkv) == repr(fast.layers[0].qkv)
    assert all("prepacked" in repr(linear) for linear in fast.linears)
    assert not any("prepacked" in repr(linear) for linear in low.linears)
    assert fast.deferred_bytes == sum(linear.weight_dense().nbytes for linear in [*fast.linears][:-1])
    assert low.deferred_bytes == 0
    assert low.num_bytes < fast.num_bytes
    fast.forgo_grad_layouts()
    assert fast.deferred_bytes == 0
    for one, other in zip(fast.linears, low.linears, strict=True):
        assert torch.equal(one.weight_dense(), other.weight_dense())
