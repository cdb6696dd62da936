"""Which requests and jobs were in the engine's hands when it died: a small memory-mapped file that survives
the process.

The engine writes the ids of every plan before it runs it; after a death the API process reads the last plan.
Two processes share the format, so it lives beside them and needs the standard library alone.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path

_SIZE = 1 << 16
_LENGTH_BYTES = 4


class FlightRecorder:
    """The engine's side: overwrite the record before each iteration (no system call, a memory copy)."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)

    def record(self, ids: Iterable[str]) -> None:
        """Replace the record. Ids beyond the file's 64 KiB are left out."""
        data = "\n".join(ids).encode()[: _SIZE - _LENGTH_BYTES]
        self._map[:_LENGTH_BYTES] = bytes(_LENGTH_BYTES)
        self._map[_LENGTH_BYTES : _LENGTH_BYTES + len(data)] = data
        self._map[:_LENGTH_BYTES] = len(data).to_bytes(_LENGTH_BYTES, "little")

    def close(self) -> None:
        """Unmap the file; the record stays on disk."""
        self._map.close()


def read_flight_record(path: Path) -> set[str]:
    """Ids of the plans that a dead engine had begun and not finished; empty if there were none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return set()
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    text = data[_LENGTH_BYTES : _LENGTH_BYTES + length].decode(errors="ignore")
    return {line for line in text.split("\n") if line}
