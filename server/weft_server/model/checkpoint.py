"""The tensors of a model directory: which file holds which tensor, and reading them one at a time.

Owns `model.safetensors` and its sharded form with `model.safetensors.index.json`. Knows tensor names as
opaque strings; what they mean belongs to `loading`. Pickle files are never opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from weft_server.model.config_fields import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `num_bytes` from byte `start` of `file`; dtype in safetensors' spelling (BF16)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class Checkpoint:
    """An opened model directory; get one from `open_checkpoint`."""

    def __init__(self, tensors: dict[str, TensorInfo], handles: dict[Path, Any]) -> None:
        self._tensors = tensors
        self._handles = handles

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.num_bytes for info in self._tensors.values())

    def info(self, name: str) -> TensorInfo:
        """Raises ModelError when there is no such tensor."""
        if name not in self._tensors:
            raise ModelError(f"tensor {name} is missing from the model's files", param=name)
        return self._tensors[name]

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, backed by the mapped file: copy what is to outlive the checkpoint.

        Raises:
            ModelError: there is no such tensor, or its bytes cannot be read.
        """
        info = self.info(name)
        try:
            tensor: Tensor = self._handles[info.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"tensor {name} of {info.file} cannot be read: {error}", param=name) from error
        return tensor

    def read_bytes(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Raw little-endian bytes of a tensor, from byte `offset` of it."""
        info = self.info(name)
        with info.file.open("rb") as file:
            file.seek(info.start + offset)
            return file.read(min(num_bytes, info.num_bytes - offset))


@contextmanager
def open_checkpoint(directory: Path) -> Iterator[Checkpoint]:
    """Opens the safetensors of a model directory for the duration of a `with` block.

    Raises:
        ModelError: not a directory; no safetensors (naming what is there instead); a shard that is missing,
            damaged or not as the index says.
    """
    files, index = _find_files(directory)
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            try:
                handles[file] = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                found = _read_header(file)
            except (SafetensorError, OSError, ValueError) as error:
                raise ModelError(f"{file} cannot be read as safetensors: {error}") from error
            for name, info in found.items():
                if name in tensors:
                    raise ModelError(
                        f"tensor {name} is in both {tensors[name].file.name} and {file.name}", param=name
                    )
                tensors[name] = info
        for name, file_name in index.items():
            if name not in tensors or tensors[name].file.name != file_name:
                raise ModelError(
                    f"{INDEX_FILE} places tensor {name} in {file_name}, which lacks it", param=name
                )
        yield Checkpoint(tensors, handles)


def _find_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files to open, and the index (tensor name to file name; empty for a single file)."""
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a directory")
    index_file, single_file = directory / INDEX_FILE, directory / SINGLE_FILE
    if index_file.is_file():
        index = _read_index(index_file)
        files = [directory / name for name in sorted(set(index.values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ModelError(f"{directory} lacks {', '.join(absent)}, which {INDEX_FILE} names")
        return files, index
    if single_file.is_file():
        return [single_file], {}
    raise ModelError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}{_what_is_there(directory)}")


def _what_is_there(directory: Path) -> str:
    if (directory / "adapter_model.safetensors").exists():
        return ": it is an adapter's directory, not a base model's"
    pickles = sorted(file.name for pattern in _PICKLE_PATTERNS for file in directory.glob(pattern))
    if pickles:
        return f", only {pickles[0]}: pickle files are never loaded, convert the model to safetensors"
    return ""


def _read_index(file: Path) -> dict[str, str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{file} has no weight_map")
    for name, target in weight_map.items():
        is_plain = isinstance(target, str) and PurePath(target).name == target
        if not is_plain or not target.endswith(".safetensors"):
            raise ModelError(f"{file} places tensor {name} in {target!r}, which is no safetensors file here")
    return weight_map


def _read_header(file: Path) -> dict[str, TensorInfo]:
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    data_start = 8 + header_bytes
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        tensors[name] = TensorInfo(
            file, entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin
        )
    return tensors
