"""A `weft serve` of the benchmark's own: started on a free port, stopped in good order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from weft_server.bench.report import BenchError

_READY = "Weft is ready: "


@contextmanager
def served(model: str, data_dir: Path, flags: Sequence[str] = ()) -> Iterator[str]:
    """A server with this data folder and these flags of `weft serve`; yields its address. It has checkpointed
    and stopped when the context is left.

    Raises:
        BenchError: it does not start; its own output says why.
    """
    command = [sys.executable, "-m", "weft_server.cli", "serve", model, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--data-dir", str(data_dir), *flags], stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith(_READY):
            raise BenchError(f"the server did not start (status {process.wait()}); it says above why")
        yield line.removeprefix(_READY).strip()
    finally:
        process.terminate()
        process.wait()
