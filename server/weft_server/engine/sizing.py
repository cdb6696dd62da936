"""How much of everything: device, dtype and the sizes that the user left open, from free memory and the
model's shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from weft_scheduler.limits import Limits
from weft_server.cache.kv import KvCache
from weft_server.engine.config import EngineConfig
from weft_server.errors import ConfigError
from weft_server.model.activations import LayerActivations
from weft_server.model.config import ModelConfig
from weft_server.model.weights import DecoderWeights

BLOCK_SIZE = 16
NUM_ADAPTER_SLOTS = 256
TRAINING_ADAPTER_SHARE = 0.375
PINNED_ADAPTER_SHARE = 0.125
GRAPH_SHARE = 0.05
"""Of the usable memory; cache, arena and activations leave a tenth, whose other half is scratch."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MAX_CPU_CACHE_TOKENS = 1 << 18
_MAX_CUDA_CACHE_TOKENS = 1 << 21
_MB = 1 << 20


@dataclass(frozen=True, slots=True)
class DeviceDefaults:
    """Sizes that depend on the kind of device alone."""

    max_num_seqs: int
    max_batch_tokens: int
    window_tokens: int
    max_pack_tokens: int
    pipeline_depth: int
    cache_share: float
    arena_share: float
    max_arena_mb: int
    layer_input_share: float
    activation_share: float


CPU_DEFAULTS = DeviceDefaults(
    max_num_seqs=64,
    max_batch_tokens=1024,
    window_tokens=64,
    max_pack_tokens=1024,
    pipeline_depth=0,
    cache_share=0.25,
    arena_share=0.05,
    max_arena_mb=1024,
    layer_input_share=0.10,
    activation_share=0.10,
)
CUDA_DEFAULTS = DeviceDefaults(
    max_num_seqs=256,
    max_batch_tokens=2048,
    window_tokens=512,
    max_pack_tokens=4096,
    pipeline_depth=1,
    cache_share=0.55,
    arena_share=0.10,
    max_arena_mb=16384,
    layer_input_share=0.10,
    activation_share=0.15,
)


def choose_device(name: str) -> torch.device:
    """The device to compute on, a GPU by its index; `auto` is CUDA if there is one.

    Raises:
        ConfigError: a device that is not there.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"--device is {name!r}, but PyTorch sees no CUDA device; use --device cpu or auto")
    idx = torch.device(name).index if ":" in name else torch.cuda.current_device()
    if idx >= torch.cuda.device_count():
        raise ConfigError(
            f"--device is {name!r}, but PyTorch sees {torch.cuda.device_count()} CUDA device(s), numbered "
            f"from 0; use a smaller number"
        )
    return torch.device("cuda", idx)


def use_device(device: torch.device) -> None:
    """Make it the calling thread's current device: streams, events and Triton kernels then belong to it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 where the hardware has bf16 arithmetic, else fp32."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Whether the processor has bf16 dot products (AVX-512 BF16, AMX, or Arm's BF16 extension)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(f" {flag}" in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def free_memory_bytes(device: torch.device) -> int:
    """Memory that an allocation could take now: of the GPU, or of the machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, _cgroup_limit_bytes())
    raise ConfigError(
        "free memory cannot be read from /proc/meminfo; give --kv-cache-tokens and --adapter-arena-mb"
    )


def _cgroup_limit_bytes() -> int:
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return 1 << 62
    return 1 << 62 if text == "max" else max(0, int(text) - used)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The scheduler's limits, and what else the engine allocates by.

    `max_graph_bytes` is what captured graphs and their scratch may take.
    """

    limits: Limits
    max_pack_tokens: int
    pipeline_depth: int
    max_graph_bytes: int = 1 << 30


def choose_sizes(config: EngineConfig, weights: DecoderWeights) -> Sizes:
    """Fill in what the user left open, after the weights are loaded.

    Raises:
        ConfigError: a size that cannot be honoured, with the size that could.
    """
    model, device = weights.config, weights.device
    defaults = CUDA_DEFAULTS if device.type == "cuda" else CPU_DEFAULTS
    usable = max(0, _usable_bytes(config, device) - weights.deferred_bytes)
    kv_bytes = KvCache.bytes_per_token(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=weights.dtype,
    )
    cache_tokens = _cache_tokens(config, device, int(usable * defaults.cache_share) // kv_bytes)
    max_model_len = _max_model_len(config, model, cache_tokens)
    max_num_seqs = config.max_num_seqs or defaults.max_num_seqs
    max_batch_tokens = config.max_batch_tokens or max(
        defaults.max_batch_tokens, max_num_seqs + defaults.window_tokens
    )
    window_tokens = min(defaults.window_tokens, max(1, max_batch_tokens - max_num_seqs))
    arena_bytes = (config.adapter_arena_mb or _arena_mb(usable, defaults)) * _MB
    input_bytes = (model.num_layers + 1) * model.hidden_size * weights.dtype.itemsize
    train_tokens = int(usable * defaults.layer_input_share) // input_bytes
    activation_bytes = model.num_layers * LayerActivations.bytes_per_row(model, weights.dtype)
    kept_tokens = int(usable * defaults.activation_share) // activation_bytes
    _check_memory(config, usable, cache_tokens, kv_bytes, arena_bytes)
    num_blocks = cache_tokens // BLOCK_SIZE
    reserve = min(num_blocks // 4, 4 * max_model_len // BLOCK_SIZE)
    pack_room = (num_blocks - reserve) * BLOCK_SIZE
    train_tokens = min(train_tokens, pack_room, 16 * defaults.max_pack_tokens)
    try:
        limits = Limits(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            max_model_len=max_model_len,
            num_adapter_slots=NUM_ADAPTER_SLOTS,
            training_adapter_share=TRAINING_ADAPTER_SHARE,
            pinned_adapter_share=PINNED_ADAPTER_SHARE,
            arena_elements=arena_bytes // weights.dtype.itemsize // 64 * 64,
            window_tokens=window_tokens,
            num_layers=model.num_layers,
            max_train_tokens=train_tokens,
            max_kept_tokens=min(kept_tokens, train_tokens),
            max_inflight=defaults.pipeline_depth + 1,
            inference_reserve_blocks=reserve,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Sizes(
        limits,
        min(defaults.max_pack_tokens, limits.max_pack_tokens),
        defaults.pipeline_depth,
        int(usable * GRAPH_SHARE),
    )


def _usable_bytes(config: EngineConfig, device: torch.device) -> int:
    free = free_memory_bytes(device)
    if device.type != "cuda":
        return free
    _, total = torch.cuda.mem_get_info(device)
    return max(0, free - int(total * (1 - config.gpu_memory_utilization)))


def _check_memory(
    config: EngineConfig, usable: int, cache_tokens: int, kv_bytes: int, arena_bytes: int
) -> None:
    """Refuse the size that the user gave and this machine cannot hold beside the other one.

    Raises:
        ConfigError: the key, its value and the largest one allowed.
    """
    cache_bytes = cache_tokens * kv_bytes
    if cache_bytes + arena_bytes <= usable:
        return
    cache_room = usable - (arena_bytes if arena_bytes < usable else 0)
    arena_room = usable - (cache_bytes if cache_bytes < usable else 0)
    if config.kv_cache_tokens is not None and (config.adapter_arena_mb is None or cache_bytes > arena_bytes):
        raise ConfigError(
            f"--kv-cache-tokens is {config.kv_cache_tokens}, which takes {_mb(cache_bytes)} MiB; the memory "
            f"that is free beside weights and adapter arena is {_mb(cache_room)} MiB. Allowed: "
            f"{2 * BLOCK_SIZE} to {cache_room // kv_bytes}"
        )
    if config.adapter_arena_mb is not None:
        raise ConfigError(
            f"--adapter-arena-mb is {config.adapter_arena_mb}; the memory that is free beside weights and KV "
            f"cache is {_mb(arena_room)} MiB. Allowed: 1 to {_mb(arena_room)}"
        )


def _mb(num_bytes: int) -> int:
    return num_bytes // _MB


def _cache_tokens(config: EngineConfig, device: torch.device, affordable: int) -> int:
    if config.kv_cache_tokens is not None:
        if config.kv_cache_tokens < 2 * BLOCK_SIZE:
            raise ConfigError(
                f"--kv-cache-tokens is {config.kv_cache_tokens}; it must be at least {2 * BLOCK_SIZE}"
            )
        return config.kv_cache_tokens // BLOCK_SIZE * BLOCK_SIZE
    ceiling = _MAX_CUDA_CACHE_TOKENS if device.type == "cuda" else _MAX_CPU_CACHE_TOKENS
    wanted = min(ceiling, affordable)
    if wanted < 2 * BLOCK_SIZE:
        raise ConfigError(
            f"free memory holds a cache of {affordable} tokens only; free some or choose a smaller model"
        )
    return wanted // BLOCK_SIZE * BLOCK_SIZE


def _max_model_len(config: EngineConfig, model: ModelConfig, cache_tokens: int) -> int:
    if config.max_model_len is None:
        return min(model.max_position_embeddings, cache_tokens)
    if config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len is {config.max_model_len}, but the model was made for "
            f"{model.max_position_embeddings} positions; give at most that"
        )
    if config.max_model_len > cache_tokens:
        raise ConfigError(
            f"--max-model-len is {config.max_model_len}, but the cache holds {cache_tokens} tokens; "
            f"lower it or raise --kv-cache-tokens"
        )
    return config.max_model_len


def _arena_mb(usable: int, defaults: DeviceDefaults) -> int:
    return max(16, min(defaults.max_arena_mb, int(usable * defaults.arena_share) // _MB))
