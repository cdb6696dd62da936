"""Whether a file lies in the kernel's page cache, and how to get it out. Knows nothing of what is in it.

Linux alone; needs no privileges for files of one's own. What lies below the kernel (a hypervisor's cache, the
disk's own) is out of reach.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path


def cached_share(path: Path) -> float:
    """Part of a file's pages that are in the page cache, from 0 to 1.

    Raises:
        OSError: the file cannot be opened, is empty, or the kernel does not tell.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        num_pages = -(-len(pages) // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * num_pages)()
        first_byte = ctypes.c_char.from_buffer(pages)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            address, size = ctypes.c_void_p(ctypes.addressof(first_byte)), ctypes.c_size_t(len(pages))
            if libc.mincore(address, size, resident) != 0:
                raise OSError(ctypes.get_errno(), "mincore failed")
        except AttributeError as error:
            raise OSError(f"{sys.platform} has no mincore") from error
        finally:
            # A mapping cannot be closed while something points into it.
            del first_byte
        return sum(page & 1 for page in resident) / num_pages


def evict(path: Path) -> None:
    """Ask the kernel to drop a file's pages, which have been written back.

    Raises:
        OSError: the file cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def why_not_evictable(path: Path) -> str | None:
    """Why a file cannot be brought out of the page cache here; None if it can (and now is)."""
    try:
        evict(path)
        share = cached_share(path)
    except (OSError, AttributeError) as error:
        return f"the page cache cannot be dropped or looked into here: {error}"
    if share > 0.0:
        return f"the page cache is warm: {share:.0%} of a file in {path.parent} stayed in it when dropped"
    return None


def filesystem_of(path: Path) -> str:
    """The kind of file system that a path lies on, e.g. `ext4`; `an unknown file system` where the kernel
    does not tell."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    mounts = [line.split(" ") for line in lines]
    above = [(Path(mount[1]), mount[2]) for mount in mounts if path.resolve().is_relative_to(mount[1])]
    # Of mounts of one path the last one counts.
    return max(
        reversed(above), key=lambda found: len(found[0].parts), default=(path, "an unknown file system")
    )[1]


def read_file(path: Path, buffer: memoryview) -> None:
    """Read a whole file in order into a buffer of its size: the ceiling of what reads it.

    Raises:
        OSError: it cannot be read, or is shorter.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        done = 0
        while done < len(buffer):
            num_read = os.readv(fd, [buffer[done:]])
            if not num_read:
                raise OSError(f"{path} ended after {done} of {len(buffer)} bytes")
            done += num_read
    finally:
        os.close(fd)
