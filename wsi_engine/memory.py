"""Memory of the process: how much is to be had, how to keep what was freed, and what to say when it ran out."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from wsi_engine.cgroup import control_groups
from wsi_engine.errors import WsiError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER = 2**31 - 1

_VERSIONS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""What a control group allows, what it uses, and what of that is files it may drop (a line of memory.stat), by version
2 and 1."""

_RAN_OUT = ("out of memory", "allocate memory", "not enough memory")
"""Words of torch's that are no error of a kind of their own: those of its allocators for the processor, and CUDA's."""


@cache
def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next allocation instead of giving it back to the system.

    A network on the CPU allocates and frees hundreds of megabytes in every forward pass. glibc returns such blocks at
    once, and the next pass faults them in again page by page, which takes as long as the arithmetic. Peak memory is the
    same; only the memory between passes is higher. For the whole process, once; returns whether it could be done (on
    Linux with glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library, such as musl
        return False
    return all((mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, _NEVER), mallopt(_M_MMAP_THRESHOLD, 2**25)))


def available_memory() -> int:
    """Bytes that can be had without swapping: the least of what the system and the control groups leave."""
    return max(0, min([_system_memory(), *_group_memory(control_groups("memory"))]))


@contextmanager
def explain_memory(kind: type[WsiError], sentence: str) -> Iterator[None]:
    """Turn memory that ran out, of the processor or of torch's device, into one sentence.

    Raises:
        WsiError: as ``kind``: it did.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _ran_out(error):
            raise
        raise kind(sentence) from error


def _ran_out(error: Exception) -> bool:
    import torch  # noqa: PLC0415 - whoever is here has most likely loaded it

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return any(words in said for words in _RAN_OUT)


def _group_memory(groups: Iterable[Path]) -> list[int]:
    """Bytes that each control group with a limit leaves; pages of files that it may drop are free."""
    free = []
    for group in groups:
        for limit, used, dropped in _VERSIONS:
            try:
                left = int((group / limit).read_text()) - int((group / used).read_text())
            except (OSError, ValueError):  # not there, or "max": no limit
                continue
            free.append(left + _read_stat(group / "memory.stat", dropped))
    return free


def _read_stat(file: Path, name: str) -> int:
    """A number of ``memory.stat``; 0 where it is not told."""
    try:
        for line in file.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def _system_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (OSError, ValueError, AttributeError):
        return 4 * 2**30
