"""One server per data directory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from weft_server.errors import ConfigError
from weft_server.store.lock import DataDirLock

StartWorker = Callable[..., "subprocess.Popen[str]"]


def test_a_second_server_is_refused_naming_the_first_and_the_remedy(
    tmp_path: Path, start_worker: StartWorker
) -> None:
    worker = start_worker("sqlite", tmp_path, "lock")
    assert worker.stdout is not None
    assert worker.stdout.readline() == "locked\n"
    with pytest.raises(ConfigError) as caught:
        DataDirLock(tmp_path).acquire()
    assert f"process {worker.pid}" in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert "--data-dir" in caught.value.message


def test_a_killed_server_leaves_no_lock(tmp_path: Path, start_worker: StartWorker) -> None:
    worker = start_worker("sqlite", tmp_path, "lock")
    assert worker.stdout is not None
    worker.stdout.readline()
    worker.kill()
    worker.wait()
    with DataDirLock(tmp_path):
        pass


def test_a_released_lock_can_be_taken_again(tmp_path: Path) -> None:
    lock = DataDirLock(tmp_path / "made" / "here")
    for _ in range(2):
        with lock, pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            DataDirLock(tmp_path / "made" / "here").acquire()
    lock.release()


def test_taking_a_held_lock_again_is_a_mistake(tmp_path: Path) -> None:
    with DataDirLock(tmp_path) as lock, pytest.raises(RuntimeError, match="already held"):
        lock.acquire()


def test_child_processes_do_not_keep_the_lock(tmp_path: Path) -> None:
    with DataDirLock(tmp_path):
        child = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE)
    with DataDirLock(tmp_path):
        child.communicate()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--data-dir"):
        DataDirLock(tmp_path / "file").acquire()
