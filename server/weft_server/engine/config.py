"""What the engine process is told at start: resolved settings, as plain values that travel as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine process. None means: sized from free memory and device.

    `model_dir` is a local Hugging Face directory; `model_name` is what exported adapters call it.
    `receive_address` and `send_address` are ZeroMQ endpoints; `epoch` numbers this engine among those that
    the API process has started. Latencies are milliseconds.
    """

    model_dir: str
    model_name: str
    epoch: int
    receive_address: str
    send_address: str
    flight_record: str
    store_url: str
    data_dir: str
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "auto"
    low_memory: bool = False
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_batch_tokens: int | None = None
    kv_cache_tokens: int | None = None
    adapter_arena_mb: int | None = None
    gpu_memory_utilization: float = 0.90
    tpot_slo_ms: float | None = None
    ttft_slo_ms: float | None = None
    slo_percentile: float = 95.0
    flex_tpot_slo_ms: float | None = None
    flex_ttft_slo_ms: float | None = None
    prefix_cache: bool = True
    enforce_eager: bool = False
    tenant_weights: dict[str, float] | None = None
    tenant_max_concurrency: dict[str, int] | None = None
    log_level: str = "info"

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> EngineConfig:
        """Inverse of `to_json`."""
        return EngineConfig(**json.loads(text))
