"""vLLM's Triton shrink and expand on the same adapters, where vLLM can be imported.

Its arguments have changed over time, so that the metadata's own `meta_args` is asked for them; a version
with yet another interface is reported as not measured.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft_server.adapters.packed import PackedAdapter
from weft_server.adapters.paths import MODULES
from weft_server.bench.kernels.case import Call
from weft_server.bench.surroundings import is_installed

log = logging.getLogger(__name__)


def vllm_lora(
    adapters: Sequence[PackedAdapter],
    runs: Sequence[tuple[int, int, int]],
    modules: Sequence[int],
    x: Tensor,
    y: Tensor,
) -> Call | None:
    """Shrink and expand of a group of modules; ranks are padded to the largest, as vLLM's pool has them.

    Args:
        runs: `(adapter, first row, rows)`.
        x, y: input and output, as for `weft_kernels.lora.lora_forward`.

    Returns:
        One call, or None where vLLM cannot be imported or called.
    """
    if not is_installed("vllm"):
        return None
    try:
        call = _build(adapters, runs, modules, x, y)
        call()
    except (ImportError, AttributeError, TypeError) as error:
        log.warning("vLLM's LoRA kernels cannot be called here: %s", error)
        return None
    return call


def _build(
    adapters: Sequence[PackedAdapter],
    runs: Sequence[tuple[int, int, int]],
    modules: Sequence[int],
    x: Tensor,
    y: Tensor,
) -> Call:
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    rank = max(adapter.max_rank for adapter in adapters)
    stacked = [_stack(adapters, module, rank, x) for module in modules]
    mapping = torch.empty(len(x), dtype=torch.int32, device=x.device)
    for adapter_idx, first, rows in runs:
        mapping[first : first + rows] = adapter_idx
    meta: Any = LoRAKernelMeta.make(len(adapters), len(x), x.device)
    meta.prepare_tensors(mapping)
    wants_flag = len(inspect.signature(meta.meta_args).parameters) > 1
    arguments = meta.meta_args(len(x), False) if wants_flag else meta.meta_args(len(x))
    shrunk = torch.empty(len(modules), len(x), rank, dtype=torch.float32, device=x.device)
    all_a, all_b = [a for a, _ in stacked], [b for _, b in stacked]

    def call() -> None:
        lora_shrink(x, all_a, shrunk, *arguments, 1.0)
        lora_expand(shrunk, all_b, y, *arguments, offset_start=0, add_inputs=True)

    return call


def _stack(adapters: Sequence[PackedAdapter], module: int, rank: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """A `[adapters, rank, K]` and B `[adapters, N, rank]`, zero beyond an adapter's rank; B has the scale."""
    name = MODULES[module]
    all_a, all_b = [], []
    for adapter in adapters:
        lora_a = adapter.layout.a(adapter.weights, 0, name)
        lora_b = adapter.layout.b(adapter.weights, 0, name) * adapter.scales[0, name]
        missing = rank - len(lora_a)
        all_a.append(torch.nn.functional.pad(lora_a, (0, 0, 0, missing)))
        all_b.append(torch.nn.functional.pad(lora_b, (0, 0, 0, missing)).t())
    return tuple(torch.stack(t).to(like.device, like.dtype).contiguous() for t in (all_a, all_b))  # type: ignore[return-value]
