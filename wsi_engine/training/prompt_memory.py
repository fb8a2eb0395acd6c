"""How much memory training needs at its peak, beyond what the process held before."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK = "5"
"""What tells Linux to forget a process's peak (proc(5), clear_refs)."""


class MemoryWatch:
    """Memory of the process, or of a CUDA device where that is trained on, from the moment the watch is made.

    On a processor it is resident memory; the peak of an epoch where the system lets a process forget its peak, else the
    peak so far. Freed memory that the C library keeps counts as held.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._held("VmRSS")

    def reset(self) -> None:
        """Forget the peak."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with suppress(OSError):
            _RESET.write_text(_PEAK, encoding="ascii")

    def read(self) -> float | None:
        """MiB at the peak since :meth:`reset`, beyond those at the start; None where the system does not tell."""
        peak = self._held("VmHWM")
        return None if peak is None or self._before is None else max(0.0, peak - self._before)

    def _held(self, name: str) -> float | None:
        """MiB by a name of ``/proc/self/status``; on a CUDA device what torch has given out, now or at the peak."""
        if self._device.type == "cuda":
            ask = torch.cuda.memory_allocated if name == "VmRSS" else torch.cuda.max_memory_allocated
            return float(ask(self._device)) / 2**20
        try:
            found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
        except OSError:
            return _peak_of_process()
        return int(found[1]) / 1024 if found else _peak_of_process()


def _peak_of_process() -> float | None:
    """MiB at the peak of the process's life; None on systems that do not tell."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)
