"""Pre-quantized checkpoints: bitsandbytes' NF4 tensors, read as they are.

Owns the packed layout that `bitsandbytes` writes (`QuantState.as_dict(packed=True)`) and what of a
`quantization_config` can be served. Knows nothing of model architectures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft_kernels.nf4 import NESTED_BLOCK_SIZE, Nf4Weight
from weft_server.model.checkpoint import Checkpoint
from weft_server.model.config_fields import ConfigFields, ModelError

_STATE_SUFFIX = ".quant_state.bitsandbytes__"
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def check_quantization_config(quantization: Mapping[str, Any]) -> None:
    """Refuses pre-quantized checkpoints other than bitsandbytes NF4.

    Raises:
        ModelError: another method or type, named.
    """
    fields = ConfigFields(quantization, where="config.json, quantization_config")
    is_bitsandbytes_default = bool(fields.get("load_in_4bit") or fields.get("load_in_8bit"))
    method = fields.get("quant_method") or ("bitsandbytes" if is_bitsandbytes_default else None)
    if method != "bitsandbytes":
        raise ModelError(
            f"the checkpoint is quantized with {method!r}; supported are bitsandbytes NF4 and unquantized",
            param="quant_method",
        )
    if fields.get("load_in_8bit") or not fields.get("load_in_4bit"):
        raise ModelError(
            "the checkpoint is in bitsandbytes' 8-bit format; supported is NF4", param="load_in_8bit"
        )
    quant_type = fields.get("bnb_4bit_quant_type") or "fp4"
    if quant_type != "nf4":
        raise ModelError(
            f"the checkpoint's bnb_4bit_quant_type is {quant_type!r}; supported is 'nf4'",
            param="bnb_4bit_quant_type",
        )


def is_quantized(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the weight `name` is stored in bitsandbytes' 4-bit layout.

    Raises:
        ModelError: it is, but as another type than NF4.
    """
    if name + _STATE_SUFFIX + "fp4" in checkpoint:
        raise ModelError(f"tensor {name} is quantized as fp4; supported is nf4", param=name)
    return name + _STATE_SUFFIX + "nf4" in checkpoint


def part_names(checkpoint: Checkpoint, name: str) -> list[str]:
    """All tensors that make up the quantized weight `name`."""
    suffixes = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE_SUFFIX + "nf4")
    return [name + suffix for suffix in suffixes if name + suffix in checkpoint]


def read_nf4(checkpoint: Checkpoint, name: str, shape: tuple[int, int], device: torch.device) -> Nf4Weight:
    """Reads the quantized weight `name`, which must have `shape` (N, K), onto `device`.

    Raises:
        ModelError: a part is missing, or parts contradict each other or the shape; the tensor is named.
    """
    state = _read_state(checkpoint, name)
    if tuple(state.get("shape") or ()) != shape:
        raise ModelError(
            f"tensor {name} has shape {state.get('shape')}, the model needs {list(shape)}", param=name
        )
    block_size, dtype = state.get("blocksize"), _DTYPES.get(str(state.get("dtype")))
    if block_size not in _BLOCK_SIZES or dtype is None:
        raise ModelError(
            f"tensor {name}: blocksize={block_size}, dtype={state.get('dtype')} unsupported", param=name
        )
    num_elements = shape[0] * shape[1]
    num_blocks = -(-num_elements // block_size)
    parts = _Parts(checkpoint, name, device)
    codes = checkpoint.tensor(name).contiguous().reshape(-1).view(torch.uint8)
    if codes.numel() < -(-num_elements // 2):
        raise ModelError(
            f"tensor {name} holds {codes.numel()} bytes, too few for {num_elements} codes", param=name
        )
    codes = codes[: -(-num_elements // 2)].to(device, copy=True)
    quant_map = parts.read(".quant_map", torch.float32, 16)
    if "nested_offset" not in state:
        return Nf4Weight(
            codes=codes,
            shape=shape,
            dtype=dtype,
            block_size=block_size,
            quant_map=quant_map,
            absmax=parts.read(".absmax", torch.float32, num_blocks),
        )
    if state.get("nested_blocksize") != NESTED_BLOCK_SIZE:
        raise ModelError(
            f"tensor {name}: nested_blocksize={state.get('nested_blocksize')} is unsupported (only 256)",
            param=name,
        )
    num_groups = -(-num_blocks // NESTED_BLOCK_SIZE)
    return Nf4Weight(
        codes=codes,
        shape=shape,
        dtype=dtype,
        block_size=block_size,
        quant_map=quant_map,
        absmax_codes=parts.read(".absmax", torch.uint8, num_blocks),
        nested_absmax=parts.read(".nested_absmax", torch.float32, num_groups),
        nested_offset=torch.full((num_groups,), float(state["nested_offset"]), device=device),
        nested_map=parts.read(".nested_quant_map", torch.float32, 256),
    )


class _Parts:
    """The tensors beside one quantized weight, checked as they are read."""

    def __init__(self, checkpoint: Checkpoint, name: str, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self._device = device

    def read(self, suffix: str, dtype: torch.dtype, num_elements: int) -> Tensor:
        name = self._name + suffix
        tensor = self._checkpoint.tensor(name)
        if tensor.dtype != dtype or tensor.numel() != num_elements:
            raise ModelError(
                f"tensor {name} is {tensor.dtype} {list(tensor.shape)}, not {num_elements} of {dtype}",
                param=name,
            )
        return tensor.reshape(-1).to(self._device, copy=True)


def _read_state(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    key = name + _STATE_SUFFIX + "nf4"
    try:
        state = json.loads(bytes(checkpoint.tensor(key).numpy()))
    except ValueError as error:
        raise ModelError(f"tensor {key} cannot be read as JSON: {error}", param=key) from error
    if not isinstance(state, dict) or state.get("quant_type") != "nf4":
        raise ModelError(f"tensor {key} does not describe an nf4 weight", param=key)
    return state
