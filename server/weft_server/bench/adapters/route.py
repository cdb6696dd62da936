"""An adapter's way from a store into the arena: the whole of it as the engine goes it, and its stages.

Knows no store: bytes come from a call.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, isfinite

import safetensors.torch
import torch
from torch import Tensor

from weft_server.adapters.arena import AdapterArena
from weft_server.adapters.fetch import AdapterFetcher, ReadBlob
from weft_server.adapters.host_cache import HostCache
from weft_server.adapters.image import HostImage
from weft_server.adapters.packed import AdapterDigest, PackedAdapter
from weft_server.adapters.paths import MODULES, module_path
from weft_server.adapters.peft import read_peft
from weft_server.bench.report import BenchError
from weft_server.model.config import ModelConfig
from weft_server.protocol import AdapterRef
from weft_server.store.digest import CHUNK_BYTES

_POLL_S = 1e-4
"""An engine without work looks every 2 ms, a busy one after every iteration."""

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """One adapter as PEFT stores it, and as Weft packs it."""

    packed: PackedAdapter
    config_json: bytes
    safetensors: bytes

    @property
    def nbytes(self) -> int:
        """Size of `adapter_model.safetensors`."""
        return len(self.safetensors)


class Target:
    """An arena with room for one adapter, on the device.

    Args:
        config: of the base that the adapter fits.
        num_elements: of the adapter.
        dtype, device: of the arena.
    """

    def __init__(
        self, config: ModelConfig, num_elements: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = config
        self.num_elements = num_elements
        self.dtype = dtype
        self.device = device
        self._arena = AdapterArena(num_elements, 1, config.num_layers, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        """What the adapter takes of the arena."""
        return self.num_elements * self.dtype.itemsize

    @property
    def on_gpu(self) -> bool:
        """Whether the copy crosses the link from the host."""
        return self.device.type == "cuda"

    def load(self, image: HostImage) -> None:
        """Copy the image into the arena and enter it in the table; returns when kernels may use it."""
        handle = self._arena.load_async(0, 0, image)
        while not handle.ready():
            pass
        handle.finish()
        self.synchronize()

    def synchronize(self) -> None:
        """Wait until the device has done what it was asked for."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Take the adapter out again."""
        self._arena.clear(0)

    def poison(self) -> None:
        """Fill the empty arena with NaN, so that what a load leaves out shows."""
        self._arena.weights.fill_(float("nan"))

    def error(self, expected: Mapping[str, Tensor]) -> float:
        """The largest difference between what kernels read and the tensors of a PEFT file, by their names in
        it; infinite for a tensor that is not in the arena.

        Args:
            expected: names and tensors as `safetensors.torch.load_file` gives them.
        """
        table = self._arena.table
        worst, num_found = 0.0, 0
        for layer in range(self.config.num_layers):
            for idx, module in enumerate(MODULES):
                entry = table.entry(0, layer, idx)
                if entry is None:
                    continue
                path = f"{_PREFIX}{module_path(layer, module)}"
                pairs = ((entry.a, f"{path}.lora_A.weight"), (entry.b.t(), f"{path}.lora_B.weight"))
                for actual, name in pairs:
                    if name not in expected or expected[name].shape != actual.shape:
                        return inf
                    difference = actual.cpu().float() - expected[name].to(self.dtype).float()
                    largest = float(difference.abs().max())
                    worst = max(worst, largest if isfinite(largest) else inf)
                    num_found += 1
        return worst if num_found == len(expected) else inf


class Route:
    """The way from one store, gone by the engine's own fetcher. A context manager that ends its threads.

    Args:
        read_blob: blob id → verified bytes.
        adapter: where the adapter's blobs are.
        target: where it goes.
        keep: whether images stay in the host cache, so that the store is asked once.
    """

    def __init__(self, read_blob: ReadBlob, adapter: AdapterRef, target: Target, *, keep: bool) -> None:
        self._adapter = adapter
        self._target = target
        self._fetcher = AdapterFetcher(
            read_blob,
            HostCache(1 << 62 if keep else 0),
            num_layers=target.config.num_layers,
            shapes=target.config.module_shapes,
            dtype=target.dtype,
            pin_memory=target.on_gpu,
        )

    def bring(self) -> None:
        """From asking for the adapter until kernels may use it; it stays in the arena.

        Raises:
            BenchError: it could not be fetched.
        """
        self._fetcher.submit(self._adapter)
        while not (results := self._fetcher.completed()):
            time.sleep(_POLL_S)
        image, error = results[0].image, results[0].error
        if image is None:
            raise BenchError(f"the adapter could not be fetched: {error.message if error else 'no reason'}")
        self._target.load(image)

    def seconds(self) -> float:
        """How long `bring` takes; the arena is empty before and after."""
        started = time.perf_counter()
        self.bring()
        seconds = time.perf_counter() - started
        self._target.clear()
        return seconds

    def close(self) -> None:
        """End the fetcher's threads."""
        self._fetcher.close()


def stages(files: AdapterFiles, target: Target) -> dict[str, Callable[[], object]]:
    """What happens to an adapter after it has been read, by stage, each by itself; and parts of stages, which
    begin with "of which". Each leaves the arena empty."""
    packed, config = files.packed, target.config
    image = HostImage.build(packed, target.dtype, pin_memory=target.on_gpu)

    def read() -> PackedAdapter:
        return read_peft(
            files.config_json, files.safetensors, num_layers=config.num_layers, shapes=config.module_shapes
        )

    def load() -> None:
        target.load(image)
        target.clear()

    tensors = safetensors.torch.load(files.safetensors)
    return {
        "of which SHA-256 of the file": lambda: _hash_chunks(files.safetensors),
        "parse, check, pack, digest": read,
        "of which parsing safetensors": lambda: safetensors.torch.load(files.safetensors),
        "of which SHA-256 of every tensor": lambda: digest_of(packed, tensors),
        "cast for the arena, check the range": lambda: HostImage.build(
            packed, target.dtype, pin_memory=target.on_gpu
        ),
        "copy into the arena, table entries": load,
    }


def digest_of(packed: PackedAdapter, tensors: Mapping[str, Tensor]) -> str:
    """The digest that names an adapter, computed from a PEFT file's tensors."""
    digest = AdapterDigest()
    for entry in packed.layout:
        path = f"{_PREFIX}{module_path(entry.layer, entry.module_name)}"
        scale = packed.scales[entry.layer, entry.module_name]
        digest.add(entry, scale, tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"])
    return digest.value()


def _hash_chunks(content: bytes) -> str:
    digest = hashlib.sha256()
    view = memoryview(content)
    for start in range(0, len(view), CHUNK_BYTES):
        digest.update(view[start : start + CHUNK_BYTES])
    return digest.hexdigest()
