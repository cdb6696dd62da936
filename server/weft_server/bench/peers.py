"""What a user would run instead: transformers + PEFT, on the very weights that Weft has.

The libraries are imported here alone, when they are asked for: without them, Weft is measured by itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from weft_server.adapters.packed import PackedAdapter
from weft_server.adapters.paths import MODULES
from weft_server.bench.models import RandomModel
from weft_server.bench.report import BenchError
from weft_server.bench.surroundings import is_installed

PeerFormat: TypeAlias = Literal["none", "nf4"]
PeerModel: TypeAlias = Any
"""A transformers or PEFT model; their types are known where they are installed."""

PEER = "transformers + PEFT"

_LORA_PATH = re.compile(r"layers\.(\d+)\.\w+\.(\w+)$")
_BASE_ADAPTER = "__base__"
"""PEFT's name, in a mixed batch, for rows without an adapter."""


def why_absent(quantization: str) -> str | None:
    """Why transformers + PEFT cannot be measured here; None if they can."""
    wanted = ["transformers", "peft", *(["bitsandbytes"] if quantization == "nf4" else [])]
    missing = [library for library in wanted if not is_installed(library)]
    if missing:
        return f"{', '.join(missing)} not installed"
    return (
        None
        if quantization in ("none", "nf4")
        else f"no peer computes on {quantization} weights as Weft does"
    )


def build_peer(model: RandomModel, quantization: PeerFormat) -> PeerModel:
    """A transformers causal language model that holds the weights of `model`, frozen, in evaluation mode.

    With `nf4` the decoder's linears are bitsandbytes' `Linear4bit` (block 64, double quantization), as
    `BitsAndBytesConfig` makes them.

    Raises:
        BenchError: a parameter that no weight was drawn for.
    """
    import transformers

    fields = dict(model.shape.hf_config)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    # Its frequencies are no part of a checkpoint, so they are computed anew rather than left on `meta`.
    rotary = peer.model.rotary_emb
    peer.model.rotary_emb = type(rotary)(config).to(model.device)
    for name, tensor in model.tensors().items():
        owner_name, _, kind = name.rpartition(".")
        owner = peer.get_submodule(owner_name)
        if quantization == "nf4" and owner_name.rpartition(".")[2] in MODULES and kind == "weight":
            _replace(peer, owner_name, _linear_4bit(tensor, owner))
        else:
            setattr(owner, kind, nn.Parameter(tensor, requires_grad=False))
    if model.config.tie_word_embeddings:
        peer.tie_weights()
    left = [name for name, parameter in peer.named_parameters() if parameter.is_meta]
    if left:
        raise BenchError(f"no weights were drawn for {', '.join(left[:3])}")
    return peer.eval()


def add_adapters(
    peer: PeerModel, adapters: Sequence[PackedAdapter], dtypes: Sequence[torch.dtype]
) -> PeerModel:
    """PEFT's model with the adapters under the names of `adapter_name`, the first active, in evaluation mode.

    Args:
        dtypes: of each adapter's weights. PEFT's default is fp32; the base's own dtype is faster.
    """
    import peft

    wrapped: PeerModel = None
    for idx, (adapter, dtype) in enumerate(zip(adapters, dtypes, strict=True)):
        config = peft.LoraConfig(
            r=adapter.config.rank,
            lora_alpha=adapter.config.alpha,
            lora_dropout=0.0,
            target_modules=list(adapter.target_modules),
            task_type="CAUSAL_LM",
        )
        name = adapter_name(idx)
        if wrapped is None:
            wrapped = peft.get_peft_model(peer, config, name)
        else:
            wrapped.add_adapter(name, config)
        _fill(wrapped, name, adapter, dtype)
    return wrapped.eval()


def adapter_name(idx: int | None) -> str:
    """PEFT's name of the adapter of this index; None: of rows that use none."""
    return _BASE_ADAPTER if idx is None else f"adapter-{idx}"


def peer_gradients(peer: PeerModel, adapter: PackedAdapter, name: str) -> Tensor:
    """The gradients of one adapter as a flat fp32 vector in Weft's layout."""
    flat = torch.zeros(adapter.num_elements)
    for layer, module, lora in _lora_layers(peer):
        adapter.layout.a(flat, layer, module).copy_(lora.lora_A[name].weight.grad)
        adapter.layout.b(flat, layer, module).copy_(lora.lora_B[name].weight.grad.t())
    return flat


def _fill(peer: PeerModel, name: str, adapter: PackedAdapter, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for layer, module, lora in _lora_layers(peer):
            lora.lora_A[name].to(dtype).weight.copy_(adapter.layout.a(adapter.weights, layer, module))
            lora.lora_B[name].to(dtype).weight.copy_(adapter.layout.b(adapter.weights, layer, module).t())


def _lora_layers(peer: PeerModel) -> list[tuple[int, str, Any]]:
    """(layer, module, PEFT's layer) of every adapted linear."""
    found = []
    for path, module in peer.named_modules():
        match = _LORA_PATH.search(path)
        if match is not None and hasattr(module, "lora_A"):
            found.append((int(match[1]), match[2], module))
    return found


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _linear_4bit(weight: Tensor, like: nn.Module) -> nn.Module:
    import bitsandbytes

    out_features, in_features = weight.shape
    linear = bitsandbytes.nn.Linear4bit(
        in_features,
        out_features,
        bias=getattr(like, "bias", None) is not None,
        compute_dtype=weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    packed = bitsandbytes.nn.Params4bit(
        weight.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=linear
    )
    linear.weight = packed.to(weight.device)
    made: nn.Module = linear
    return made
