"""Devices by their published figures, and the limits that the engine would choose on them.

Bandwidths and dense bf16 rates are the vendors' (H200 SXM, A100 SXM 80 GB, L4); `cpu` is a two-core server
processor with AVX-512, from measurements. What is reached of the peaks is stated here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weft_scheduler.limits import Limits
from weft_scheduler.simulator.shapes import DENSE_BYTES, ModelShape

BLOCK_SIZE = 16
NUM_ADAPTER_SLOTS = 256
TRAINING_ADAPTER_SHARE, PINNED_ADAPTER_SHARE = 0.375, 0.125
MEMORY_UTILIZATION = 0.90
CACHE_SHARE, ARENA_SHARE, LAYER_INPUT_SHARE, ACTIVATION_SHARE = 0.55, 0.10, 0.10, 0.15
MAX_CACHE_TOKENS = 1 << 21
MAX_ARENA_BYTES = 16384 << 20
EXPANSION_SHARE = 0.25
"""A dense copy is kept beside quantized weights where it takes at most this part of the memory."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a device can do.

    `bandwidth` and `flops` are peaks in bytes and operations a second, of which `memory_efficiency` and
    `compute_efficiency` are reached by streaming and by large products. `fused_rows` is the number of rows
    up to which quantized weights are multiplied without being expanded. `launch_s` is the time to start one
    kernel, `overhead_s` what every iteration costs beside its kernels (planning, metadata, sampling).
    Adapters come from the store at `store_bandwidth` after `store_latency_s` and reach the device at
    `link_bandwidth`.
    """

    name: str
    memory_bytes: float
    bandwidth: float
    flops: float
    memory_efficiency: float = 0.80
    compute_efficiency: float = 0.55
    fused_rows: int = 64
    launch_s: float = 4e-6
    overhead_s: float = 1.0e-3
    link_bandwidth: float = 20e9
    store_bandwidth: float = 1e9
    store_latency_s: float = 5e-3
    host_cache_bytes: float = 2 << 30
    max_num_seqs: int = 256
    max_batch_tokens: int = 2048
    window_tokens: int = 512
    max_pack_tokens: int = 4096
    pipeline_depth: int = 1


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", 141e9, 4.8e12, 989e12),
        Gpu("a100", 80e9, 2.039e12, 312e12),
        Gpu("l4", 24e9, 300e9, 121e12, link_bandwidth=10e9),
        Gpu(
            "cpu",
            16e9,
            20e9,
            120e9,
            fused_rows=0,
            launch_s=4e-6,
            overhead_s=0.5e-3,
            link_bandwidth=5e9,
            store_latency_s=1e-3,
            max_num_seqs=64,
            max_batch_tokens=1024,
            window_tokens=64,
            max_pack_tokens=1024,
            pipeline_depth=0,
        ),
    )
}


class DoesNotFit(ValueError):
    """The model leaves no room on the device; the message gives the bytes."""


def keeps_expansion(shape: ModelShape, gpu: Gpu, quantization: str) -> bool:
    """Whether a dense copy of quantized weights is kept for batches of more than `fused_rows` rows."""
    if quantization == "none":
        return False
    return gpu.fused_rows == 0 or shape.decoder_weights * DENSE_BYTES <= EXPANSION_SHARE * gpu.memory_bytes


def choose_limits(
    shape: ModelShape,
    gpu: Gpu,
    quantization: str,
    *,
    max_model_len: int | None = None,
    kv_cache_tokens: int | None = None,
    arena_bytes: float | None = None,
    window_tokens: int | None = None,
) -> Limits:
    """The sizes that the engine would choose on this device, after its weights are loaded.

    Raises:
        DoesNotFit: weights, or a cache of one context, exceed the memory.
    """
    dense = shape.decoder_weights * DENSE_BYTES if keeps_expansion(shape, gpu, quantization) else 0
    usable = gpu.memory_bytes * MEMORY_UTILIZATION - shape.weight_bytes(quantization) - dense
    affordable = int(max(0.0, usable) * CACHE_SHARE) // shape.kv_bytes_per_token
    cache_tokens = kv_cache_tokens or min(affordable, MAX_CACHE_TOKENS)
    num_blocks = cache_tokens // BLOCK_SIZE
    if usable <= 0.0 or num_blocks < 2:
        weights_gb = (shape.weight_bytes(quantization) + dense) / 1e9
        raise DoesNotFit(
            f"{shape.name} in {quantization} takes {weights_gb:.1f} GB; "
            f"{gpu.name} offers {gpu.memory_bytes * MEMORY_UTILIZATION / 1e9:.1f} GB: choose "
            f"{'' if quantization == 'nf4' else 'nf4, '}a larger device or a smaller model"
        )
    context = min(max_model_len or shape.max_model_len, shape.max_model_len, num_blocks * BLOCK_SIZE)
    reserve = min(num_blocks // 4, 4 * context // BLOCK_SIZE)
    pack_room = (num_blocks - reserve) * BLOCK_SIZE
    train_tokens = int(usable * LAYER_INPUT_SHARE) // shape.kept_bytes_per_token
    train_tokens = min(train_tokens, pack_room, 16 * gpu.max_pack_tokens)
    kept_tokens = int(usable * ACTIVATION_SHARE) // shape.activation_bytes_per_token
    arena_bytes = arena_bytes or min(MAX_ARENA_BYTES, usable * ARENA_SHARE)
    return Limits(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=gpu.max_num_seqs,
        max_batch_tokens=gpu.max_batch_tokens,
        max_model_len=context,
        num_adapter_slots=NUM_ADAPTER_SLOTS,
        training_adapter_share=TRAINING_ADAPTER_SHARE,
        pinned_adapter_share=PINNED_ADAPTER_SHARE,
        arena_elements=int(arena_bytes) // DENSE_BYTES // 64 * 64,
        window_tokens=window_tokens or gpu.window_tokens,
        num_layers=shape.num_layers,
        max_train_tokens=train_tokens,
        max_kept_tokens=min(kept_tokens, train_tokens),
        max_inflight=gpu.pipeline_depth + 1,
        inference_reserve_blocks=reserve,
    )
