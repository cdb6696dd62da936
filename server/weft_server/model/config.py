"""What a decoder is: the shape facts of one base model, read from a Hugging Face `config.json`.

Owns the translation of that file (both spellings of every renamed field) into one validated, immutable
value, and the refusal, by name, of whatever would change the outputs and is not implemented. Knows nothing of
weights, devices or files other than `config.json`.

Defaults of absent fields are those of transformers' configuration classes of the same family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from weft_server.model.config_fields import ConfigFields, ModelError
from weft_server.model.rope_config import RopeConfig, RopeType, read_rope

Family = Literal["llama", "mistral", "qwen2", "qwen3"]

__all__ = ["MODULES", "Family", "ModelConfig", "ModelError", "RopeConfig", "RopeType"]

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_ARCHITECTURES: Mapping[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_DEFAULT_MAX_POSITIONS: Mapping[Family, int] = {
    "llama": 2048,
    "mistral": 4096 * 32,
    "qwen2": 32768,
    "qwen3": 32768,
}
_DEFAULT_NUM_KV_HEADS: Mapping[Family, int] = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_DEFAULT_WINDOW = 4096
_DEFAULT_QWEN_MAX_WINDOW_LAYERS = 28

# Fields of related architectures that alter the outputs, with the value at which they do not.
_UNSUPPORTED_UNLESS: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu", "swish"),
    "hidden_activation": (None, "silu", "swish"),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None, 0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape facts of one decoder-only base model.

    sliding_windows: for each layer the number of most recent positions (the token's own included) that its
        attention sees, or None for all of them.
    dtype: the checkpoint's own dtype name ("bfloat16"), when it states one.
    quantization: the checkpoint's `quantization_config`, untouched, when it is pre-quantized.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    quantization: dict[str, Any] | None = None

    @staticmethod
    def from_dict(hf_config: Mapping[str, Any]) -> ModelConfig:
        """Reads the content of a Hugging Face `config.json`.

        Raises:
            ModelError: an unsupported architecture or feature, a missing or impossible field; each is named.
        """
        if not isinstance(hf_config, Mapping):
            raise ModelError(f"config.json holds a {type(hf_config).__name__}; it should hold an object")
        fields = ConfigFields(hf_config)
        family = _read_family(fields)
        for name, neutral in _UNSUPPORTED_UNLESS.items():
            if fields.get(name) not in neutral:
                raise ModelError(f"config.json: {name}={fields.get(name)!r} is not supported", param=name)
        hidden_size = fields.count("hidden_size")
        num_heads = fields.count("num_attention_heads")
        num_layers = fields.count("num_hidden_layers")
        num_kv_heads = _read_num_kv_heads(fields, family, num_heads)
        if num_heads % num_kv_heads:
            raise ModelError(
                f"config.json: num_attention_heads={num_heads} is not a multiple of"
                f" num_key_value_heads={num_kv_heads}"
            )
        max_positions = fields.count("max_position_embeddings", _DEFAULT_MAX_POSITIONS[family])
        attention_bias = family in ("llama", "qwen3") and fields.flag("attention_bias", False)
        return ModelConfig(
            family=family,
            vocab_size=fields.count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.count("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_read_head_dim(fields, family, hidden_size, num_heads),
            max_position_embeddings=max_positions,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=read_rope(fields, max_positions),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family == "llama" and fields.flag("mlp_bias", False),
            qk_norm=family == "qwen3",
            sliding_windows=_read_sliding_windows(fields, family, num_layers),
            dtype=_read_dtype(fields),
            bos_token_id=_read_bos(fields, family),
            eos_token_ids=_read_eos(fields, family),
            quantization=_read_quantization(fields),
        )

    @staticmethod
    def from_directory(path: Path | str) -> ModelConfig:
        """Reads `config.json` of a model directory.

        Raises:
            ModelError: no such directory, no or unreadable `config.json`, or as `from_dict`.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise ModelError(f"{directory} is not a directory")
        file = directory / "config.json"
        if not file.is_file():
            raise ModelError(f"{directory} holds no config.json: it is not a Hugging Face model directory")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} cannot be read as JSON: {error}") from error
        if not isinstance(content, dict):
            raise ModelError(f"{file} holds a JSON {type(content).__name__}, not an object")
        return ModelConfig.from_dict(content)

    @property
    def q_size(self) -> int:
        """Output features of q_proj."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Output features of k_proj and of v_proj."""
        return self.num_kv_heads * self.head_dim

    @property
    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of every linear module of a layer, in the order of `MODULES`."""
        return {
            "q_proj": (self.hidden_size, self.q_size),
            "k_proj": (self.hidden_size, self.kv_size),
            "v_proj": (self.hidden_size, self.kv_size),
            "o_proj": (self.q_size, self.hidden_size),
            "gate_proj": (self.hidden_size, self.intermediate_size),
            "up_proj": (self.hidden_size, self.intermediate_size),
            "down_proj": (self.intermediate_size, self.hidden_size),
        }

    def has_bias(self, module: str) -> bool:
        """Whether the linear `module` (one of `MODULES`) of this model has a bias."""
        if module in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        return self.o_bias if module == "o_proj" else self.mlp_bias

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return asdict(self)

    def architecture_facts(self) -> dict[str, Any]:
        """The fields that define the function computed from given weights, JSON-able, for fingerprints."""
        not_part_of_it = ("dtype", "bos_token_id", "eos_token_ids", "quantization", "max_position_embeddings")
        return {name: value for name, value in self.to_dict().items() if name not in not_part_of_it}


def _read_family(fields: ConfigFields) -> Family:
    model_type = fields.get("model_type")
    supported = ", ".join(_ARCHITECTURES.values())
    families: tuple[Family, ...] = get_args(Family)
    architectures = fields.get("architectures")
    if model_type is None:
        raise fields.bad("model_type", f"one of {', '.join(get_args(Family))}")
    if architectures is not None and not isinstance(architectures, list):
        raise fields.bad("architectures", "a list")
    for family in families:
        if model_type == family and (not architectures or architectures == [_ARCHITECTURES[family]]):
            return family
    raise ModelError(
        f"config.json: architecture {architectures or model_type!r} (model_type {model_type!r}) is not"
        f" supported; supported are {supported}",
        param="architectures",
    )


def _read_num_kv_heads(fields: ConfigFields, family: Family, num_heads: int) -> int:
    if "num_key_value_heads" in fields:
        return fields.count("num_key_value_heads", num_heads)
    return _DEFAULT_NUM_KV_HEADS.get(family, num_heads)


def _read_head_dim(fields: ConfigFields, family: Family, hidden_size: int, num_heads: int) -> int:
    if fields.get("head_dim") is None and family != "qwen3" and hidden_size % num_heads:
        raise ModelError(
            f"config.json: hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads},"
            " and head_dim is not given"
        )
    head_dim = fields.count("head_dim", 128 if family == "qwen3" else hidden_size // num_heads)
    if head_dim % 2:
        raise fields.bad("head_dim", "even: rotary embedding turns pairs")
    return head_dim


def _read_sliding_windows(fields: ConfigFields, family: Family, num_layers: int) -> tuple[int | None, ...]:
    layer_types = _read_layer_types(fields, num_layers)
    everywhere: tuple[int | None, ...] = (None,) * num_layers
    if family == "llama":
        if layer_types is not None and "sliding_attention" in layer_types:
            raise ModelError(
                "config.json: layer_types with sliding_attention is not supported for llama",
                param="layer_types",
            )
        return everywhere
    if family == "mistral":
        explicit_none = "sliding_window" in fields and fields.get("sliding_window") is None
        window = None if explicit_none else fields.count("sliding_window", _DEFAULT_WINDOW)
        wanted = "full_attention" if window is None else "sliding_attention"
        if layer_types is not None and set(layer_types) != {wanted}:
            raise ModelError(
                f"config.json: layer_types of a mistral model with sliding_window={window} must all be"
                f" {wanted}",
                param="layer_types",
            )
        return (window,) * num_layers
    if not fields.flag("use_sliding_window", False):
        return everywhere
    window = fields.count("sliding_window", _DEFAULT_WINDOW)
    if layer_types is None:
        first = fields.get("max_window_layers")
        first = _DEFAULT_QWEN_MAX_WINDOW_LAYERS if first is None else first
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise fields.bad("max_window_layers", "a whole number")
        layer_types = [
            "sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)
        ]
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _read_layer_types(fields: ConfigFields, num_layers: int) -> list[str] | None:
    layer_types = fields.get("layer_types")
    if layer_types is None:
        return None
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise fields.bad("layer_types", f"a list of {num_layers} names")
    for kind in layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(f"config.json: layer type {kind!r} is not supported", param="layer_types")
    return layer_types


def _read_dtype(fields: ConfigFields) -> str | None:
    value = fields.get("dtype") if fields.get("dtype") is not None else fields.get("torch_dtype")
    if value is None:
        return None
    if not isinstance(value, str):
        raise fields.bad("dtype", "the name of a dtype")
    return value.removeprefix("torch.")


def _read_bos(fields: ConfigFields, family: Family) -> int | None:
    value = fields.get("bos_token_id")
    if "bos_token_id" not in fields and family in ("llama", "mistral"):
        return 1
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise fields.bad("bos_token_id", "a token id")
    return value


def _read_eos(fields: ConfigFields, family: Family) -> tuple[int, ...]:
    value = fields.get("eos_token_id")
    if "eos_token_id" not in fields and family in ("llama", "mistral"):
        return (2,)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise fields.bad("eos_token_id", "a token id or a list of them")
    return tuple(ids)


def _read_quantization(fields: ConfigFields) -> dict[str, Any] | None:
    value = fields.get("quantization_config")
    if value is not None and not isinstance(value, dict):
        raise fields.bad("quantization_config", "an object")
    return value
