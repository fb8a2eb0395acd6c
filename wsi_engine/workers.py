"""How many threads this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

from wsi_engine.cgroup import control_groups


def usable_cores() -> int:
    """Cores this process may use: the least of CPU affinity, the control groups' quotas and SLURM's allotment.

    ``os.cpu_count()`` counts the whole machine, which on a shared node or in a container is many times
    what the process was given; that many threads would only wait for each other.
    """
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    quota = _least_quota(control_groups("cpu"))
    if quota is not None:
        limits.append(math.ceil(quota))
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdigit() and int(slurm) > 0:
        limits.append(int(slurm))
    return max(1, min(limits))


def _least_quota(groups: Iterable[Path]) -> float | None:
    """Cores granted by the strictest of some control groups; None without a limit."""
    quotas = [quota for quota in map(_read_quota, groups) if quota is not None]
    return min(quotas, default=None)


def _read_quota(group: Path) -> float | None:
    """Cores granted by one control group (version 2, else 1), or None without a limit."""
    try:
        quota, period = (group / "cpu.max").read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        pass
    try:
        quota_us = int((group / "cpu.cfs_quota_us").read_text())
        period_us = int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None
