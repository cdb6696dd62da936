"""The lock that keeps a second server off a data directory. Knows nothing of what lies in it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from weft_server.errors import ConfigError

LOCK_FILE = "weft.lock"


class DataDirLock:
    """An exclusive lock on a data directory, released by `release`, or by the kernel when the process dies.

    The lock belongs to the open file, which processes started by `subprocess` or spawned do not inherit.
    The lock file stays behind; it means nothing unless a live process holds it.
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock and write this process's id into it. The directory is created if absent.

        Raises:
            ConfigError: another server holds it, or the directory cannot be written or locked.
            RuntimeError: this object holds it already.
        """
        if self._fd is not None:
            raise RuntimeError(f"the lock on {self.data_dir} is already held")
        fd = self._open()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            holder = _holder(fd)
            os.close(fd)
            raise ConfigError(
                f"data directory {self.data_dir} is in use by another Weft server ({holder}); "
                "stop that server, or give this one a directory of its own with --data-dir"
            ) from error
        except OSError as error:
            os.close(fd)
            raise ConfigError(
                f"data directory {self.data_dir} cannot be locked: {error.strerror}; "
                "choose one on a local file system with --data-dir"
            ) from error
        self._fd = fd

    def release(self) -> None:
        """Give the lock back; without effect if it is not held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _open(self) -> int:
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            return os.open(self.data_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(
                f"data directory {self.data_dir} cannot be used: {error.strerror}; "
                "choose one that this user may write with --data-dir"
            ) from error


def _holder(fd: int) -> str:
    text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
    return f"process {text}" if text.isdigit() else "process unknown"
