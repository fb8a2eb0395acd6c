"""What all benchmarks share: a case, paired timing by medians, and the machine in words."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """Our way against another way of doing the same; ``target`` is the least ratio wanted."""

    name: str
    against: str
    target: float
    ours: Callable[[], object]
    theirs: Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median seconds of both ways, timed in turns in one run."""

    case: Case
    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.theirs / self.ours


def time_pair(case: Case, repeats: int = 5) -> Timing:
    """Time both ways in turns, after one unmeasured call of each, and take medians."""
    case.ours()
    case.theirs()
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(_seconds(case.ours))
        theirs.append(_seconds(case.theirs))
    return Timing(case, statistics.median(ours), statistics.median(theirs))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def describe_machine() -> str:
    """Processor, cores, system and Python in one line."""
    from wsi_engine.workers import usable_cores  # noqa: PLC0415

    name = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return (
        f"{name}, {usable_cores()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}"
    )
