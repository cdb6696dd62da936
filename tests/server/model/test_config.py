"""ModelConfig against transformers' own reading of the same `config.json`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from weft_server.model.config import ModelConfig, ModelError

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
FAMILIES = sorted(ARCHITECTURES)


def hf_config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    return {**BASE, "model_type": family, "architectures": [ARCHITECTURES[family]], **changes}


def oracle(content: dict[str, Any]) -> Any:
    return transformers.AutoConfig.for_model(**{k: v for k, v in content.items() if k != "architectures"})


def assert_agrees_with_transformers(content: dict[str, Any]) -> None:
    config, expected = ModelConfig.from_dict(content), oracle(content)
    assert config.num_kv_heads == expected.num_key_value_heads
    assert config.head_dim == getattr(
        expected, "head_dim", content["hidden_size"] // content["num_attention_heads"]
    )
    assert config.max_position_embeddings == expected.max_position_embeddings
    assert config.rms_norm_eps == expected.rms_norm_eps
    assert config.tie_word_embeddings == expected.tie_word_embeddings
    assert config.bos_token_id == expected.bos_token_id
    eos = expected.eos_token_id
    assert config.eos_token_ids == tuple([] if eos is None else eos if isinstance(eos, list) else [eos])
    assert config.rope.theta == expected.rope_parameters["rope_theta"]
    assert config.rope.type == expected.rope_parameters["rope_type"]
    for name, value in config.rope.parameters.items():
        if name in expected.rope_parameters:
            assert expected.rope_parameters[name] == value


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_take_the_defaults_of_transformers(family: str) -> None:
    content = hf_config(family)
    assert_agrees_with_transformers(content)
    del content["num_key_value_heads"]
    content |= {"num_attention_heads": 32, "hidden_size": 256}
    assert_agrees_with_transformers(content)
    if family != "mistral":
        assert_agrees_with_transformers({**content, "num_key_value_heads": None})


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_of_rope_and_dtype_are_read(family: str) -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = hf_config(family, rope_theta=5e5, rope_scaling=llama3, torch_dtype="bfloat16")
    new = hf_config(family, rope_parameters={"rope_theta": 5e5, **llama3}, dtype="bfloat16")
    assert_agrees_with_transformers(old)
    assert_agrees_with_transformers(new)
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)
    assert ModelConfig.from_dict(new).dtype == "bfloat16"
    assert ModelConfig.from_dict(new).rope.theta == 5e5


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "attention_factor": 0.9},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
    ids=["default", "linear", "yarn", "yarn-all", "llama3"],
)
def test_rope_types_resolve_their_parameters_as_transformers_does(rope: dict[str, Any]) -> None:
    content = hf_config(rope_scaling=dict(rope), max_position_embeddings=2048)
    assert_agrees_with_transformers(content)
    parameters = ModelConfig.from_dict(content).rope.parameters
    for name, value in rope.items():
        if name not in ("rope_type", "type"):
            assert parameters[name] == value


def test_an_original_context_beside_the_rope_parameters_takes_precedence() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0}
    content = hf_config(rope_scaling=rope, original_max_position_embeddings=256, max_position_embeddings=2048)
    assert ModelConfig.from_dict(content).rope.parameters["original_max_position_embeddings"] == 256
    expected = oracle(content)
    expected.standardize_rope_params()  # as its rotary embedding does first
    assert expected.rope_parameters["original_max_position_embeddings"] == 256


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_saved_by_transformers_reads_back(family: str, tmp_path: Path) -> None:
    content = hf_config(family, rope_theta=1e6, eos_token_id=[3, 4], tie_word_embeddings=True)
    oracle(content).save_pretrained(tmp_path)
    config = ModelConfig.from_directory(tmp_path)
    direct = ModelConfig.from_dict(content)
    assert config.architecture_facts() == direct.architecture_facts()
    assert config.eos_token_ids == (3, 4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("max_window_layers", [0, 1, 2, 28])
def test_qwen_windows_start_at_max_window_layers(family: str, max_window_layers: int) -> None:
    content = hf_config(
        family, use_sliding_window=True, sliding_window=16, max_window_layers=max_window_layers
    )
    expected = oracle(content)
    windows = tuple(
        expected.sliding_window if kind == "sliding_attention" else None for kind in expected.layer_types
    )
    assert ModelConfig.from_dict(content).sliding_windows == windows
    assert ModelConfig.from_dict({**content, "use_sliding_window": False}).sliding_windows == (None,) * 3


def test_qwen_layer_types_decide_where_they_are_given() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    content = hf_config("qwen3", use_sliding_window=True, sliding_window=8, layer_types=kinds)
    assert ModelConfig.from_dict(content).sliding_windows == (8, None, 8)


def test_mistral_windows_hold_for_every_layer() -> None:
    assert ModelConfig.from_dict(hf_config("mistral", sliding_window=16)).sliding_windows == (16,) * 3
    assert ModelConfig.from_dict(hf_config("mistral", sliding_window=None)).sliding_windows == (None,) * 3
    assert ModelConfig.from_dict(hf_config("mistral")).sliding_windows == (4096,) * 3
    assert oracle(hf_config("mistral")).sliding_window == 4096


def test_biases_and_norms_follow_the_family() -> None:
    llama = ModelConfig.from_dict(hf_config("llama", attention_bias=True, mlp_bias=True))
    assert all(llama.has_bias(module) for module in llama.module_shapes)
    qwen2 = ModelConfig.from_dict(hf_config("qwen2"))
    assert [m for m in qwen2.module_shapes if qwen2.has_bias(m)] == ["q_proj", "k_proj", "v_proj"]
    assert ModelConfig.from_dict(hf_config("qwen3")).qk_norm
    assert not any(ModelConfig.from_dict(hf_config("mistral")).has_bias(m) for m in qwen2.module_shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_module_shapes_are_those_of_the_transformers_model(family: str) -> None:
    content = hf_config(family, head_dim=32)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(oracle(content))
    layer = model.model.layers[0]
    for module, (in_features, out_features) in ModelConfig.from_dict(content).module_shapes.items():
        linear = getattr(
            layer.mlp if module in ("gate_proj", "up_proj", "down_proj") else layer.self_attn, module
        )
        assert (linear.in_features, linear.out_features) == (in_features, out_features)
        assert (linear.bias is not None) == ModelConfig.from_dict(content).has_bias(module)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "longrope"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1.0}},
            "contradict",
        ),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": None}, "vocab_size"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"quantization_config": "nf4"}, "quantization_config"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_would_change_the_outputs_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        ModelConfig.from_dict(hf_config(**change))


def test_alternating_mistral_layers_are_refused() -> None:
    content = hf_config("mistral", sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
    with pytest.raises(ModelError, match="layer_types"):
        ModelConfig.from_dict({**content, "num_hidden_layers": 4})


def test_a_directory_that_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a directory"):
        ModelConfig.from_directory(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"no config\.json"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="JSON"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="list"):
        ModelConfig.from_directory(tmp_path)


def test_a_configuration_is_json_able_and_its_facts_leave_out_what_changes_nothing() -> None:
    config = ModelConfig.from_dict(hf_config(torch_dtype="float16", eos_token_id=7))
    json.dumps(config.to_dict())
    same = ModelConfig.from_dict(hf_config(dtype="bfloat16", eos_token_id=8))
    other = ModelConfig.from_dict(hf_config(rope_theta=1e6))
    assert config.architecture_facts() == same.architecture_facts() != other.architecture_facts()


SUPPORTED_PUBLISHED = {
    "Llama-3.1-8B-Instruct": (128, "llama3"),
    "Llama-3.2-3B-Instruct": (128, "llama3"),
    "Mistral-7B-Instruct-v0.3": (128, "default"),
    "Qwen2-0.5B": (64, "default"),
    "Qwen3-8B": (128, "default"),
    "SmolLM-135M": (64, "default"),
}
UNSUPPORTED_PUBLISHED = {"gemma-2-9b-it": "Gemma2ForCausalLM", "phi-4": "Phi3ForCausalLM"}


@pytest.fixture
def published_configs() -> Path:
    root = os.environ.get("WEFT_TEST_DATA")
    if not root:
        pytest.skip("WEFT_TEST_DATA is not set")
    return Path(root) / "configs"


@pytest.mark.parametrize("name", sorted(SUPPORTED_PUBLISHED))
def test_published_configurations_are_read(name: str, published_configs: Path) -> None:
    config = ModelConfig.from_directory(published_configs / name)
    assert (config.head_dim, config.rope.type) == SUPPORTED_PUBLISHED[name]
    assert set(config.sliding_windows) == {None}
    assert_agrees_with_transformers(json.loads((published_configs / name / "config.json").read_text()))


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_PUBLISHED))
def test_published_configurations_of_other_families_are_refused(name: str, published_configs: Path) -> None:
    with pytest.raises(ModelError, match=UNSUPPORTED_PUBLISHED[name]):
        ModelConfig.from_directory(published_configs / name)
