"""How many threads and how much memory a process may use, and where its time goes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from wsi_engine import cgroup, workers
from wsi_engine.cgroup import control_groups
from wsi_engine.clock import STAGES, StageClock
from wsi_engine.memory import _VERSIONS, _group_memory, available_memory


@pytest.fixture
def big_machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(workers, "_least_quota", lambda groups: None)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    return monkeypatch


def test_the_least_limit_counts(big_machine: pytest.MonkeyPatch) -> None:
    assert workers.usable_cores() == 64
    big_machine.setenv("SLURM_CPUS_PER_TASK", "12")
    assert workers.usable_cores() == 12
    big_machine.setattr(workers, "_least_quota", lambda groups: 2.5)
    assert workers.usable_cores() == 3
    big_machine.setattr(os, "sched_getaffinity", lambda pid: {7}, raising=False)
    assert workers.usable_cores() == 1


def test_nonsense_is_ignored(big_machine: pytest.MonkeyPatch) -> None:
    big_machine.setenv("SLURM_CPUS_PER_TASK", "many")
    assert workers.usable_cores() == 64
    big_machine.setattr(workers, "_least_quota", lambda groups: 0.2)
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
def test_quotas_of_control_groups(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    write_all(tmp_path, files)
    assert workers._least_quota(control_groups("cpu", tmp_path, tmp_path / "none")) == quota


def write_all(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


@pytest.mark.parametrize(
    ("membership", "own"),
    [
        ("0::/job/step\n", "job/step"),
        ("5:cpu,cpuacct:/job/step\n4:memory:/job/step\n", "{kind}/job/step"),
        ("1:name=systemd:/init\n0::/job/step\n", "unified/job/step"),
    ],
)
def test_the_strictest_group_on_the_way_up_counts(tmp_path: Path, membership: str, own: str) -> None:
    """Limits are set on a job's own group or on one around it; the root of a machine has none."""
    (tmp_path / "membership").write_text(membership)
    root = tmp_path / "groups"
    cpu, memory = (root / own.format(kind=kind) for kind in ("cpu", "memory"))
    first = ":cpu" in membership
    if first:
        quotas = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        write_all(cpu, {quotas[0]: "-1", quotas[1]: "100000"})
        write_all(cpu.parent, {quotas[0]: "150000", quotas[1]: "100000"})
    else:
        write_all(cpu, {"cpu.max": "max 100000"})
        write_all(cpu.parent, {"cpu.max": "150000 100000"})
    limit, used, dropped = _VERSIONS[1 if first else 0]
    stat = f"active_file 1\n{dropped} 300\n"
    write_all(memory, {limit: "5000", used: "1000", "memory.stat": stat})
    write_all(memory.parent, {limit: "2000", used: "1900", "memory.stat": stat})
    groups = control_groups("cpu", root, tmp_path / "membership")
    assert groups.index(cpu) < groups.index(cpu.parent) < groups.index(cpu.parent.parent)
    assert workers._least_quota(groups) == 1.5
    left = _group_memory(control_groups("memory", root, tmp_path / "membership"))
    assert sorted(left) == [2000 - (1900 - 300), 5000 - (1000 - 300)]


def test_groups_that_cannot_be_seen_are_not_looked_for(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("0::/../other\nnonsense\n")
    found = control_groups("memory", tmp_path, tmp_path / "membership")
    assert found == [tmp_path, tmp_path / "unified", tmp_path / "memory"]


def test_limits_of_control_groups_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the process itself sees them, from the files that the system names."""
    (tmp_path / "membership").write_text("0::/job\n")
    write_all(tmp_path / "job", {"cpu.max": "100000 100000", "memory.max": "4096", "memory.current": "96"})
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    assert workers.usable_cores() == 1
    assert available_memory() == 4000


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
