"""Reading and writing PEFT's format, with `peft` and `transformers` as the oracle."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft_kernels.lora import LoraBatch, lora_forward
from weft_server.adapters.arena import AdapterArena
from weft_server.adapters.errors import AdapterError
from weft_server.adapters.image import HostImage
from weft_server.adapters.packed import new_adapter, repack
from weft_server.adapters.paths import MODULES, module_path
from weft_server.adapters.peft import read_peft, write_peft

ALL = list(MODULES)

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all modules": {"r": 3, "lora_alpha": 5, "target_modules": ALL},
    "all-linear": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    "rslora": {"r": 5, "lora_alpha": 7, "target_modules": ALL, "use_rslora": True},
    "patterns by module": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 7, "down_proj": 1},
        "alpha_pattern": {"q_proj": 3, "mlp.up_proj": 11},
    },
    "patterns by regex, first match wins": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {
            r"layers\.[12]\..*_proj": 2,
            "q_proj": 6,
            r"^model\.layers\.0\.self_attn\.k_proj": 9,
        },
        "alpha_pattern": {r".*\.0\.mlp\.(gate|up)_proj": 1, "o_proj": 0.5},
    },
    "pattern anchored at a component": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"1.mlp.up_proj": 3},
    },
    "patterns for modules that are not targeted": {
        "r": 4,
        "target_modules": ["q_proj"],
        "rank_pattern": {"v_proj": 9, "lm_head": 2},
        "alpha_pattern": {"model.layers.0.mlp.up_proj": 1},
    },
    "patterns and rslora": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 16},
        "alpha_pattern": {"o_proj": 13},
    },
    "regex targets": {"r": 4, "target_modules": r".*layers\.(0|2)\.(self_attn\.[qv]|mlp\.down)_proj"},
    "regex with lookahead": {"r": 4, "target_modules": r"(?!.*\.1\.).*\b(?:q|k|gate)_proj$"},
    "whole paths": {"r": 4, "target_modules": [module_path(1, "q_proj"), module_path(2, "down_proj")]},
    "path suffixes": {"r": 4, "target_modules": ["1.self_attn.q_proj", "mlp.up_proj"]},
    "excluded by name": {
        "r": 4,
        "target_modules": ALL,
        "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"],
    },
    "excluded by regex": {"r": 4, "target_modules": "all-linear", "exclude_modules": r".*\.layers\.[01]\..*"},
    "one layer": {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "some layers": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "layers by pattern": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "layers by several patterns": {
        "r": 4,
        "target_modules": ["v_proj"],
        "layers_to_transform": [2],
        "layers_pattern": ["h", "model.layers"],
    },
    "a target that this family lacks": {"r": 4, "target_modules": ["q_proj", "c_attn"]},
    "dropout": {"r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.25},
    "gaussian init": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "random init": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False},
    "negative alpha": {"r": 4, "lora_alpha": -2, "target_modules": ["q_proj"]},
    "no task type": {"r": 4, "target_modules": ["q_proj"], "task_type": None},
}


def _peft_layers(model: peft.PeftModel) -> dict[tuple[int, str], Any]:
    layers = {}
    for name, module in model.named_modules():
        match = re.fullmatch(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)", name)
        if match and isinstance(module, peft.tuners.lora.LoraLayer):
            layers[int(match[1]), match[2]] = module
    return layers


def _logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(20).view(2, 10) % 97
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_is_read_as_peft_means_it(name, family, save_peft, num_layers, shapes):
    saved = save_peft(family, **CONFIGS[name])
    packed = read_peft(saved.config_json, saved.weights, num_layers=num_layers, shapes=shapes)
    expected = _peft_layers(saved.model)
    assert expected
    assert set(packed.scales) == set(expected)
    assert {(entry.layer, entry.module_name) for entry in packed.layout} == set(expected)
    for (layer, module), oracle in expected.items():
        assert packed.layout.lookup(layer, module).rank == oracle.r["default"]
        assert packed.scales[layer, module] == oracle.scaling["default"]
        assert torch.equal(packed.layout.a(packed.weights, layer, module), oracle.lora_A["default"].weight)
        assert torch.equal(
            packed.layout.b(packed.weights, layer, module), oracle.lora_B["default"].weight.t()
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_an_exported_adapter_loads_in_peft_and_computes_the_same(
    name, save_peft, base_model, num_layers, shapes, tmp_path
):
    saved = save_peft("llama", **CONFIGS[name])
    packed = read_peft(saved.config_json, saved.weights, num_layers=num_layers, shapes=shapes)
    config_json, weights = write_peft(packed, base_model_name="some/base")
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(config_json)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    reloaded = peft.PeftModel.from_pretrained(base_model("llama"), str(folder)).eval()
    assert torch.equal(_logits(reloaded), _logits(saved.model))
    assert not torch.equal(_logits(reloaded), _logits(base_model("llama")))
    again = read_peft(config_json, weights, num_layers=num_layers, shapes=shapes)
    assert again.digest == packed.digest
    assert again.scales == packed.scales
    assert again.config.dropout == packed.config.dropout


def test_the_packed_adapter_in_the_arena_adds_what_a_peft_layer_adds(save_peft, num_layers, shapes):
    saved = save_peft("llama", **CONFIGS["patterns by regex, first match wins"])
    packed = read_peft(saved.config_json, saved.weights, num_layers=num_layers, shapes=shapes)
    arena = AdapterArena(4 * packed.num_elements, 4, num_layers, torch.float32, torch.device("cpu"))
    arena.load(2, 640, HostImage.build(packed, torch.float32))
    batch = LoraBatch.build([(2, 0, 5)], torch.device("cpu"))
    for (layer, module), oracle in _peft_layers(saved.model).items():
        x = torch.randn(5, shapes[module][0], generator=torch.Generator().manual_seed(layer))
        with torch.no_grad():
            y = oracle.base_layer(x)
            lora_forward(x, y, arena.table, layer, (MODULES.index(module),), (y.shape[1],), batch)
            torch.testing.assert_close(y, oracle(x), rtol=1e-5, atol=1e-6)


def test_bfloat16_weights_keep_their_precision(save_peft, num_layers, shapes):
    saved = save_peft("llama", dtype=torch.bfloat16, **CONFIGS["plain"])
    packed = read_peft(saved.config_json, saved.weights, num_layers=num_layers, shapes=shapes)
    assert packed.weights.dtype == torch.bfloat16
    wide = packed.to(torch.float32)
    assert wide.weights.dtype == torch.float32
    assert wide.digest == packed.digest
    assert torch.equal(wide.weights.bfloat16(), packed.weights)


def test_mixed_precisions_are_packed_without_loss(save_peft, num_layers, shapes):
    saved = save_peft("llama", **CONFIGS["plain"])
    tensors = safetensors.torch.load(saved.weights)
    tensors = {key: t.half() if "lora_A" in key else t.bfloat16() for key, t in tensors.items()}
    packed = read_peft(
        saved.config_json, safetensors.torch.save(tensors), num_layers=num_layers, shapes=shapes
    )
    assert packed.weights.dtype == torch.float32
    expected = tensors[f"base_model.model.{module_path(0, 'q_proj')}.lora_B.weight"]
    assert torch.equal(packed.layout.b(packed.weights, 0, "q_proj").t(), expected.float())


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.removeprefix("base_model.model.").replace(".weight", ".my_name.weight"),
    ],
    ids=["without prefix", "with adapter name", "both"],
)
def test_other_spellings_of_the_keys_are_the_same_adapter(rename, save_peft, num_layers, shapes):
    saved = save_peft("llama", **CONFIGS["plain"])
    renamed = {rename(key): t for key, t in reversed(safetensors.torch.load(saved.weights).items())}
    packed = read_peft(saved.config_json, saved.weights, num_layers=num_layers, shapes=shapes)
    same = read_peft(saved.config_json, safetensors.torch.save(renamed), num_layers=num_layers, shapes=shapes)
    assert same.digest == packed.digest
    assert torch.equal(same.weights, packed.weights)


def _with_config(saved, **changes: Any) -> bytes:
    return json.dumps(json.loads(saved.config_json) | changes).encode()


REFUSED_CONFIGS: list[tuple[str, Any, str]] = [
    ("peft_type", "IA3", "peft_type"),
    ("peft_type", None, "peft_type"),
    ("task_type", "SEQ_CLS", "task_type"),
    ("use_dora", True, "DoRA"),
    ("bias", "lora_only", "bias"),
    ("lora_bias", True, "lora_bias"),
    ("modules_to_save", ["lm_head"], "modules_to_save"),
    ("fan_in_fan_out", True, "fan_in_fan_out"),
    ("trainable_token_indices", [1], "trainable_token_indices"),
    ("layer_replication", [[0, 2]], "layer_replication"),
    ("target_parameters", ["experts.gate"], "target_parameters"),
    ("alora_invocation_tokens", [1, 2], "alora_invocation_tokens"),
    ("alora_invocation_tokens", [], "alora_invocation_tokens"),
    ("use_bdlora", {}, "use_bdlora"),
    ("use_qalora", True, "use_qalora"),
    ("arrow_config", {"top_k": 3}, "arrow_config"),
    ("kasa_config", {"beta": 1.0}, "kasa_config"),
    ("velora_config", {"scale": 1.0}, "velora_config"),
    ("monteclora_config", {"num_samples": 8}, "monteclora_config"),
    ("megatron_config", {"a": 1}, "megatron_config"),
    ("init_lora_weights", "pissa", "pissa"),
    ("init_lora_weights", "pissa_niter_4", "pissa_niter_4"),
    ("init_lora_weights", "olora", "olora"),
    ("init_lora_weights", "corda", "corda"),
    ("init_lora_weights", "loftq", "loftq"),
    ("init_lora_weights", "lora_ga", "lora_ga"),
    ("init_lora_weights", "mica", "mica"),
    ("init_lora_weights", ["eva"], "init_lora_weights"),
    ("a_future_feature", 1, "a_future_feature"),
    ("a_future_feature", {"x": 0}, "a_future_feature"),
    ("r", 0, "r is 0"),
    ("r", 257, "r is 257; the rank must be 1 to 256"),
    ("r", True, "r is True"),
    ("r", 4.0, "r is 4.0"),
    ("r", "4", "r is '4'"),
    ("lora_alpha", "8", "lora_alpha"),
    ("lora_alpha", float("nan"), "lora_alpha"),
    ("lora_alpha", 1e300, "lora_alpha"),
    ("lora_alpha", 10**400, "lora_alpha"),
    ("lora_dropout", 1.0, "lora_dropout"),
    ("lora_dropout", -0.1, "lora_dropout"),
    ("use_rslora", "yes", "use_rslora"),
    ("rank_pattern", {"q_proj": 999}, "rank_pattern"),
    ("rank_pattern", {"q_proj": "8"}, "rank_pattern"),
    ("rank_pattern", ["q_proj"], "rank_pattern"),
    ("rank_pattern", {"q_proj(": 4}, "rank_pattern"),
    ("alpha_pattern", {"(a)\\1": 4}, "alpha_pattern"),
    ("exclude_modules", ".*", "exclude_modules '.*' excludes every layer that target_modules"),
    ("exclude_modules", ["q_proj", "self_attn.v_proj"], "exclude_modules"),
    ("target_modules", None, "target_modules is missing"),
    ("target_modules", [], "target_modules is missing"),
    ("target_modules", ["query"], "names no linear layer"),
    ("target_modules", ["q_proj", "embed_tokens"], "embed_tokens"),
    ("target_modules", ["q_proj", "lm_head"], "lm_head"),
    ("target_modules", ".*", "embed_tokens"),
    ("target_modules", "((q_proj", "not a regular expression"),
    ("target_modules", [1], "target_modules"),
    ("layers_to_transform", [3], "the base model has 3 layers"),
    ("layers_to_transform", ["1"], "layers_to_transform"),
    ("layers_pattern", "layers", "layers_pattern"),
]


@pytest.mark.parametrize(("key", "value", "named"), REFUSED_CONFIGS)
def test_a_configuration_that_cannot_be_honoured_is_refused_by_name(
    key, value, named, save_peft, num_layers, shapes
):
    saved = save_peft("llama", **CONFIGS["plain"])
    with pytest.raises(AdapterError, match=re.escape(named)) as caught:
        read_peft(_with_config(saved, **{key: value}), saved.weights, num_layers=num_layers, shapes=shapes)
    assert (caught.value.status, caught.value.code) == (400, "invalid_adapter")


@pytest.mark.parametrize("key", ["proj", "_proj", "c_attn", "layers.3.mlp.up_proj", "self_attn"])
@pytest.mark.parametrize("where", ["rank_pattern", "alpha_pattern"])
@pytest.mark.filterwarnings("ignore")
def test_a_pattern_key_that_peft_would_ignore_on_this_model_is_refused(
    where, key, save_peft, num_layers, shapes
):
    saved = save_peft("llama", r=4, lora_alpha=8, target_modules=ALL, **{where: {key: 16}})
    oracle = _peft_layers(saved.model).values()
    assert {(layer.r["default"], layer.scaling["default"]) for layer in oracle} == {(4, 2.0)}
    with pytest.raises(AdapterError, match=re.escape(f"{where}['{key}'] matches no module")) as caught:
        read_peft(saved.config_json, saved.weights, num_layers=num_layers, shapes=shapes)
    assert caught.value.param == where


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("a_future_feature", None),
        ("a_future_feature", False),
        ("a_future_feature", {}),
        ("a_future_feature", []),
        ("revision", "main"),
        ("peft_version", "0.99.0"),
        ("eva_config", {"rho": 2.0}),
        ("inference_mode", False),
        ("modules_to_save", []),
        ("init_lora_weights", "eva"),
        ("base_model_name_or_path", "somewhere/else"),
    ],
)
def test_what_does_not_change_outputs_changes_neither_acceptance_nor_digest(
    key, value, save_peft, num_layers, shapes
):
    saved = save_peft("llama", **CONFIGS["plain"])
    plain = read_peft(saved.config_json, saved.weights, num_layers=num_layers, shapes=shapes)
    other = read_peft(
        _with_config(saved, **{key: value}), saved.weights, num_layers=num_layers, shapes=shapes
    )
    assert other.digest == plain.digest


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"r": ' + b"1" * 5000 + b"}"]
)
def test_a_configuration_that_is_no_json_object_is_refused(content, num_layers, shapes):
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        read_peft(content, b"", num_layers=num_layers, shapes=shapes)


@pytest.mark.parametrize("initialiser", ["pissa", "olora"])
def test_initialisers_that_change_the_base_are_refused_as_peft_saves_them_and_accepted_when_converted(
    initialiser, save_peft, base_model, num_layers, shapes, tmp_path
):
    model = peft.get_peft_model(
        base_model("llama"),
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=initialiser, task_type="CAUSAL_LM"),
    ).eval()
    model.save_pretrained(str(tmp_path / "initial"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05
    model.save_pretrained(str(tmp_path / "trained"))
    config_json = (tmp_path / "trained" / "adapter_config.json").read_bytes()
    weights = (tmp_path / "trained" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        read_peft(config_json, weights, num_layers=num_layers, shapes=shapes)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(
        str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    converted = tmp_path / "converted"
    packed = read_peft(
        (converted / "adapter_config.json").read_bytes(),
        (converted / "adapter_model.safetensors").read_bytes(),
        num_layers=num_layers,
        shapes=shapes,
    )
    assert packed.max_rank == 4


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ],
)
def test_features_that_peft_really_saves_are_refused_by_name(lora, named, save_peft, num_layers, shapes):
    saved = save_peft("llama", **({"r": 2, "target_modules": ["q_proj"]} | lora))
    with pytest.raises(AdapterError, match=named):
        read_peft(saved.config_json, saved.weights, num_layers=num_layers, shapes=shapes)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def _edited(weights: bytes, **changes: Any) -> bytes:
    tensors = safetensors.torch.load(weights)
    for key, change in changes.items():
        key = key.replace("__", ".")
        value = change(tensors.get(key)) if callable(change) else change
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    return safetensors.torch.save(tensors)


def _set(key: str, value: torch.Tensor | None) -> dict[str, Any]:
    return {key.replace(".", "__"): value}


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        (f"{Q0}.lora_A.weight", None, "lora_A is not in the weights"),
        (f"{Q0}.lora_B.weight", None, "lora_B is not in the weights"),
        (f"{Q0}.lora_A.weight", torch.zeros(5, 48), "needs [4, 48]"),
        (f"{Q0}.lora_A.weight", torch.zeros(4, 47), "needs [4, 48]"),
        (f"{Q0}.lora_A.weight", torch.zeros(4, 48, 1), "needs [4, 48]"),
        (f"{Q0}.lora_B.weight", torch.zeros(4, 48), "needs [48, 4]"),
        (f"{Q0}.lora_A.weight", torch.full((4, 48), torch.nan), f"{Q0}.lora_A.weight' contains NaN"),
        (f"{Q0}.lora_B.weight", torch.full((48, 4), torch.inf), f"{Q0}.lora_B.weight' contains NaN or Inf"),
        (f"{Q0}.lora_A.weight", torch.zeros(4, 48, dtype=torch.int8), "torch.int8"),
        (f"{Q0}.lora_magnitude_vector", torch.zeros(48), "DoRA"),
        (f"{Q0}.lora_B.bias", torch.zeros(48), "bias"),
        (f"{Q0}.base_layer.weight", torch.zeros(48), "base weights"),
        (f"{Q0}.weight", torch.zeros(48), "not a LoRA weight"),
        (f"{Q0}.lora_A.other.weight", torch.zeros(4, 48), "several adapters"),
        (f"{Q0}.lora_C.weight", torch.zeros(4, 48), "not a LoRA weight"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 97), "embedding"),
        ("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 48), "lm_head"),
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", torch.zeros(4, 48), "layer 9"),
        ("base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight", torch.zeros(4, 48), "layers.00"),
        ("base_model.model.model.layers.0.mlp.q_proj.lora_A.weight", torch.zeros(4, 48), "mlp.q_proj"),
        (
            "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight",
            torch.zeros(4, 48),
            "does not target",
        ),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 48), "twice"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key(key, value, named, save_peft, num_layers, shapes):
    saved = save_peft("llama", **CONFIGS["plain"])
    weights = _edited(saved.weights, **_set(key, value))
    with pytest.raises(AdapterError, match=re.escape(named)):
        read_peft(saved.config_json, weights, num_layers=num_layers, shapes=shapes)


def test_an_adapter_of_a_larger_base_is_refused_and_of_another_width_too(save_peft, num_layers, shapes):
    saved = save_peft("llama", **CONFIGS["plain"])
    with pytest.raises(AdapterError, match="the base model has 2 layers"):
        read_peft(saved.config_json, saved.weights, num_layers=2, shapes=shapes)
    wider = dict(shapes) | {"q_proj": (64, 64)}
    with pytest.raises(AdapterError, match="64 inputs and 64 outputs"):
        read_peft(saved.config_json, saved.weights, num_layers=num_layers, shapes=wider)
    with pytest.raises(AdapterError, match="lora_A is not in the weights"):
        read_peft(saved.config_json, saved.weights, num_layers=4, shapes=shapes)


def test_pickled_weights_are_refused_before_anything_is_unpickled(save_peft, num_layers, shapes, tmp_path):
    saved = save_peft("llama", **CONFIGS["plain"])
    torch.save(safetensors.torch.load(saved.weights), tmp_path / "a.bin")
    with pytest.raises(AdapterError, match="pickle"):
        read_peft(saved.config_json, (tmp_path / "a.bin").read_bytes(), num_layers=num_layers, shapes=shapes)


@pytest.mark.parametrize("start", [b"PK", b"\x80\x04"])
def test_a_safetensors_file_that_starts_like_a_pickle_is_read(start, save_peft, num_layers, shapes):
    saved = save_peft("llama", **CONFIGS["plain"])
    header_bytes = int.from_bytes(saved.weights[:8], "little")
    longer = (int.from_bytes(start, "little") - header_bytes) % 65536
    header = saved.weights[8 : 8 + header_bytes] + b" " * longer
    weights = len(header).to_bytes(8, "little") + header + saved.weights[8 + header_bytes :]
    assert weights.startswith(start)
    packed = read_peft(saved.config_json, weights, num_layers=num_layers, shapes=shapes)
    plain = read_peft(saved.config_json, saved.weights, num_layers=num_layers, shapes=shapes)
    assert packed.digest == plain.digest


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_safetensors_file_are_refused(data):
    with pytest.raises(AdapterError):
        read_peft(
            b'{"peft_type": "LORA", "target_modules": ["q_proj"]}',
            data,
            num_layers=1,
            shapes={"q_proj": (4, 4)},
        )


def test_a_truncated_file_is_refused(save_peft, num_layers, shapes):
    saved = save_peft("llama", **CONFIGS["plain"])
    with pytest.raises(AdapterError, match="safetensors"):
        read_peft(saved.config_json, saved.weights[:-10], num_layers=num_layers, shapes=shapes)


def test_a_new_adapter_starts_like_pefts_and_depends_on_its_seed_alone(num_layers, shapes):
    def make(seed: int):
        return new_adapter(
            rank=8,
            alpha=16,
            dropout=0.1,
            target_modules=("q_proj", "down_proj"),
            use_rslora=False,
            num_layers=num_layers,
            shapes=shapes,
            seed=seed,
        )

    one, same, other = make(3), make(3), make(4)
    assert torch.equal(one.weights, same.weights)
    assert one.digest == same.digest != other.digest
    assert one.weights.dtype == torch.float32
    assert set(one.scales.values()) == {2.0}
    assert one.target_modules == ("q_proj", "down_proj")
    for entry in one.layout:
        a = one.layout.a(one.weights, entry.layer, entry.module)
        oracle = torch.empty_like(a)
        torch.nn.init.kaiming_uniform_(oracle, a=5**0.5)
        bound = entry.in_features**-0.5
        assert 0.95 * bound < a.abs().max() <= bound
        assert 0.95 * bound < oracle.abs().max() <= bound
        assert not one.layout.b(one.weights, entry.layer, entry.module).any()


@pytest.mark.parametrize("targets", [("lm_head",), ("query",), ("q_proj", "w1")])
def test_a_new_adapter_on_an_unknown_module_is_refused(targets, num_layers, shapes):
    with pytest.raises(AdapterError, match=re.escape(repr(targets[-1]))):
        new_adapter(
            rank=8,
            alpha=16,
            dropout=0.0,
            target_modules=targets,
            use_rslora=False,
            num_layers=num_layers,
            shapes=shapes,
            seed=0,
        )


def test_a_trained_master_is_published_in_float32_and_reproduced_by_peft(
    base_model, num_layers, shapes, tmp_path: Path
):
    fresh = new_adapter(
        rank=3,
        alpha=7,
        dropout=0.0,
        target_modules=MODULES,
        use_rslora=True,
        num_layers=num_layers,
        shapes=shapes,
        seed=1,
    )
    master = torch.randn(fresh.num_elements, generator=torch.Generator().manual_seed(2)) * 0.1
    trained = repack(fresh, master)
    assert trained.digest != fresh.digest
    config_json, weights = write_peft(trained, base_model_name="base")
    (tmp_path / "adapter_config.json").write_bytes(config_json)
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    assert {t.dtype for t in safetensors.torch.load(weights).values()} == {torch.float32}
    model = peft.PeftModel.from_pretrained(base_model("llama"), str(tmp_path)).eval()
    for (layer, module), oracle in _peft_layers(model).items():
        assert oracle.scaling["default"] == trained.scales[layer, module] == 7 / 3**0.5
        assert torch.equal(oracle.lora_A["default"].weight, fresh.layout.a(master, layer, module))
        assert torch.equal(oracle.lora_B["default"].weight, fresh.layout.b(master, layer, module).t())
    assert read_peft(config_json, weights, num_layers=num_layers, shapes=shapes).digest == trained.digest


def test_a_master_with_nan_is_not_published(num_layers, shapes):
    fresh = new_adapter(
        rank=3,
        alpha=7,
        dropout=0.0,
        target_modules=("q_proj",),
        use_rslora=False,
        num_layers=num_layers,
        shapes=shapes,
        seed=1,
    )
    master = fresh.weights.clone()
    fresh.layout.b(master, 1, "q_proj")[0, 0] = torch.nan
    with pytest.raises(AdapterError, match="q_proj in layer 1"):
        repack(fresh, master)
