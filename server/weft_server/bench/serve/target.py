"""What the load is sent to: a server that runs already, or one with the wanted model and tenants."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from weft_server.adapters.packed import PackedAdapter, new_adapter, repack
from weft_server.adapters.paths import MODULES
from weft_server.adapters.peft import write_peft
from weft_server.bench.checkpoint import write_checkpoint
from weft_server.bench.models import RandomModel
from weft_server.bench.serve.server import served
from weft_server.bench.serve.tenants import Account, Keys, write_keys
from weft_server.bench.shapes import SHAPES, Shape
from weft_server.model.config import ModelConfig
from weft_server.serving import DEMO_MODEL

_ADAPTER_STD = 0.01


@contextlib.contextmanager
def target(arguments: argparse.Namespace) -> Iterator[tuple[str, Keys, Shape | None]]:
    """Address and keys of the server; the shape of its weights if they are random."""
    if arguments.url is not None:
        keys: tuple[str | None, ...] = tuple(arguments.key or (None,))
        yield arguments.url.rstrip("/"), Keys(keys, keys[0]), None
        return
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as name:
        folder, model, shape = Path(name), arguments.model, None
        # A line in the log for every request would be measured too.
        flags = ["--log-level", "warning", *arguments.server_flags]
        if model in SHAPES:
            shape = Shape(model, SHAPES[model])
            model = str(folder / "model")
            random = RandomModel(shape, dtype=torch.bfloat16, device=torch.device("cpu"), seed=arguments.seed)
            write_checkpoint(random, Path(model))
        keys_found = Keys((None,))
        if arguments.tenants > 1:
            keys_found = write_keys(folder / "keys.toml", arguments.tenants)
            flags += ["--api-keys", str(folder / "keys.toml")]
        with served(model, folder / "data", flags) as url:
            _upload_adapters(arguments, url, keys_found, model)
            yield url, keys_found, shape


def _upload_adapters(arguments: argparse.Namespace, url: str, keys: Keys, model: str) -> None:
    """Random adapters, dealt to the tenants in turn."""
    if not arguments.adapters:
        return
    config = ModelConfig.from_directory(DEMO_MODEL if model == "demo" else Path(model))
    for idx in range(arguments.adapters):
        account = Account(url, keys.tenants[idx % len(keys.tenants)])
        packed = _random_adapter(config, arguments.adapter_rank, arguments.seed + idx)
        account.upload(f"adapter-{idx:05d}", *write_peft(packed, base_model_name="bench"))
        account.close()


def _random_adapter(config: ModelConfig, rank: int, seed: int) -> PackedAdapter:
    fresh = new_adapter(
        rank=rank,
        alpha=2.0 * rank,
        dropout=0.0,
        target_modules=MODULES,
        use_rslora=False,
        num_layers=config.num_layers,
        shapes=config.module_shapes,
        seed=seed,
    )
    noise = torch.randn(fresh.num_elements, generator=torch.Generator().manual_seed(seed))
    return repack(fresh, noise * _ADAPTER_STD)
