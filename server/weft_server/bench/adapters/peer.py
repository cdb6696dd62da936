"""PEFT's own load of the same files, into a model that has an adapter already.

Its base's weights are never read nor written, so they are left undrawn: allocated memory that a CPU need not
even have.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from weft_server.bench.adapters.route import AdapterFiles
from weft_server.bench.settings import Setting
from weft_server.bench.surroundings import is_installed

PEER = "PEFT load_adapter"


def why_absent() -> str | None:
    """Why PEFT cannot be measured here; None if it can."""
    missing = [library for library in ("transformers", "peft") if not is_installed(library)]
    return f"{', '.join(missing)} not installed" if missing else None


def peer_loads(setting: Setting, files: AdapterFiles, folder: Path) -> dict[str, Callable[[], float]]:
    """Seconds of PEFT's `load_adapter` from a folder, in both of its configurations.

    Args:
        folder: where the two files are written to; empty.
    """
    import peft
    import transformers

    (folder / "adapter_config.json").write_bytes(files.config_json)
    (folder / "adapter_model.safetensors").write_bytes(files.safetensors)
    fields = dict(setting.model.shape.hf_config)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=setting.model.dtype)
    base = base.to_empty(device=setting.device)
    content = json.loads(files.config_json)
    first = peft.LoraConfig(r=1, target_modules=content["target_modules"], task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(base, first, "first")

    def load(low_cpu_mem_usage: bool) -> float:
        started = time.perf_counter()
        model.load_adapter(
            str(folder),
            "measured",
            torch_device=str(setting.device),
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
        if setting.on_gpu:
            torch.cuda.synchronize(setting.device)
        seconds = time.perf_counter() - started
        model.delete_adapter("measured")
        return seconds

    return {
        f"{PEER}, low_cpu_mem_usage={usage}": lambda usage=usage: load(usage)  # type: ignore[misc]
        for usage in (False, True)
    }
