"""How many threads a process may use, and where its time goes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from wsi_engine import workers
from wsi_engine.clock import STAGES, StageClock


@pytest.fixture
def big_machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(workers, "_cgroup_quota", lambda root: None)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    return monkeypatch


def test_the_least_limit_counts(big_machine: pytest.MonkeyPatch) -> None:
    assert workers.usable_cores() == 64
    big_machine.setenv("SLURM_CPUS_PER_TASK", "12")
    assert workers.usable_cores() == 12
    big_machine.setattr(workers, "_cgroup_quota", lambda root: 2.5)
    assert workers.usable_cores() == 3
    big_machine.setattr(os, "sched_getaffinity", lambda pid: {7}, raising=False)
    assert workers.usable_cores() == 1


def test_nonsense_is_ignored(big_machine: pytest.MonkeyPatch) -> None:
    big_machine.setenv("SLURM_CPUS_PER_TASK", "many")
    assert workers.usable_cores() == 64
    big_machine.setattr(workers, "_cgroup_quota", lambda root: 0.2)
    assert workers.usable_cores() == 1


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "200000 100000\n"}, 2.0),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "garbage"}, None),
        ({}, None),
    ],
)
def test_control_groups(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert workers._cgroup_quota(tmp_path) == quota


def test_clock_adds_up_from_threads() -> None:
    clock = StageClock()
    threads = [threading.Thread(target=lambda: [clock.add("decode", 0.5) for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(ValueError, match="x"), clock.measure("write"):
        raise ValueError("x")
    seconds = clock.seconds()
    assert list(seconds) == list(STAGES)
    assert seconds["decode"] == 200.0
    assert seconds["write"] > 0
    assert seconds["read"] == 0
