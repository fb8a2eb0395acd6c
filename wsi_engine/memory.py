"""Memory that the process gives back too eagerly, and how to keep it."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER = 2**31 - 1


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
