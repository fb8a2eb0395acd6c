"""Leases: one process at a time, whatever is killed, stopped, or told by clocks."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from wsi_engine import lease as lease_module
from wsi_engine.errors import BusyError, StoreError
from wsi_engine.holder import Holder
from wsi_engine.lease import hold_lease
from wsi_engine.leaserecord import lease_record

FOREIGN = {"host": "elsewhere", "place": "another boot", "pid": 1, "started": "1", "token": "f" * 32}


def patient(_: float) -> bool:
    """Waits almost no time between two looks."""
    time.sleep(0.01)
    return False


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".a.lease"


@pytest.fixture
def soon_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 0.3)


def kill_a_holder(path: Path) -> None:
    """Leave the lease of a process that was killed."""
    code = (
        "import os, pathlib, sys; from wsi_engine.lease import hold_lease\n"
        "with hold_lease(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert path.exists()


def test_a_lease_keeps_others_out(path: Path) -> None:
    with hold_lease(path, "features/net") as lease:
        lease.check()
        with pytest.raises(BusyError, match=f"process {os.getpid()}"), hold_lease(path):
            pass
        lease.check()  # the refused one did not take it away
        sight = lease_record(path).look()
        assert sight is not None
        assert sight.holder is not None
        assert (sight.state, sight.holder.job, sight.holder.pid) == ("running", "features/net", os.getpid())
    assert os.listdir(path.parent) == []
    with pytest.raises(BusyError, match="nothing more is written here"):
        lease.check()


def test_the_lease_of_a_killed_process_is_taken_over_at_once(path: Path) -> None:
    kill_a_holder(path)
    with hold_lease(path, pause=None):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert os.listdir(path.parent) == []


def test_a_process_number_used_again_is_noticed(path: Path) -> None:
    me = Holder.this_process()
    path.write_text(json.dumps(vars(me) | {"started": str(int(me.started) - 5)}))
    with hold_lease(path, pause=None):
        assert json.loads(path.read_text())["started"] == me.started


@pytest.mark.parametrize("content", [json.dumps(FOREIGN), "{", ""])
@pytest.mark.parametrize("age", [-1e9, 0, 1e9])
def test_clocks_do_not_count(path: Path, soon_stale: None, content: str, age: float) -> None:
    """A lease that does not change ends after our own time, whatever its date; one that changes does not."""
    path.write_text(content)
    os.utime(path, (time.time() - age, time.time() - age))
    begun = time.monotonic()
    with pytest.raises(BusyError, match=r"elsewhere|just beginning"), hold_lease(path, pause=None):
        pass
    with hold_lease(path, pause=patient):
        assert time.monotonic() - begun >= 0.3
    assert os.listdir(path.parent) == []


def test_a_lease_that_changes_is_respected(path: Path) -> None:
    path.write_text(json.dumps(FOREIGN))
    looks: list[float] = []

    def pause(seconds: float) -> bool:
        looks.append(seconds)
        if len(looks) == 3:
            os.utime(path, (5, 5))  # by a clock that was put back by decades
        assert len(looks) < 4
        return False

    with pytest.raises(BusyError, match="process 1 on elsewhere"), hold_lease(path, pause=pause):
        pass
    assert looks == [lease_module.LOOK_SECONDS] * 3
    assert json.loads(path.read_text()) == FOREIGN


def test_waiting_is_given_up_when_told(path: Path) -> None:
    path.write_text(json.dumps(FOREIGN))
    stop = threading.Event()
    stop.set()
    with pytest.raises(BusyError), hold_lease(path, pause=stop.wait):
        pass


def test_time_between_two_calls_counts_as_watched(path: Path, soon_stale: None) -> None:
    path.write_text(json.dumps(FOREIGN))
    with pytest.raises(BusyError), hold_lease(path, pause=None):
        pass
    time.sleep(0.35)
    with hold_lease(path, pause=None):
        pass


def test_a_lease_that_was_lost_is_noticed_and_left_to_the_other(path: Path) -> None:
    other = json.dumps(FOREIGN)
    with hold_lease(path) as lease:
        path.unlink()
        path.write_text(other)
        before = path.stat().st_mtime_ns
        with pytest.raises(BusyError, match=r"taken over by process 1 on elsewhere while this process stood still"):
            lease.check()
        assert path.stat().st_mtime_ns == before
    assert path.read_text() == other


def test_the_heartbeat_touches_no_other_lease(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.02)
    with hold_lease(path):
        first = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == first:
            time.sleep(0.01)
        path.unlink()
        path.write_text(json.dumps(FOREIGN))
        os.utime(path, (5, 5))
        time.sleep(0.1)
        assert path.stat().st_mtime == 5


def test_without_hard_links(path: Path, monkeypatch: pytest.MonkeyPatch, soon_stale: None) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("wsi_engine.leaserecord.os.link", refuse)
    with hold_lease(path), pytest.raises(BusyError, match=f"process {os.getpid()}"), hold_lease(path):
        pass
    assert os.listdir(path.parent) == []
    path.write_text("")  # made by another process that has not yet written its name
    with pytest.raises(BusyError, match="just beginning"), hold_lease(path, pause=None):
        pass
    with hold_lease(path, pause=patient):
        pass
    assert os.listdir(path.parent) == []


def test_an_answer_that_was_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS repeats a call whose answer was lost; the second one fails, though the first did what it should."""
    link, replace = os.link, os.replace

    def linked_before(*names: object) -> None:
        link(*names)  # type: ignore[arg-type]
        raise FileExistsError(errno.EEXIST, "File exists")

    def replaced_before(*names: object) -> None:
        replace(*names)  # type: ignore[arg-type]
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr("wsi_engine.leaserecord.os.link", linked_before)
    with hold_lease(path) as lease:
        lease.check()
    kill_a_holder(path)
    monkeypatch.setattr("wsi_engine.leaserecord.os.replace", replaced_before)
    with hold_lease(path) as lease:
        lease.check()
    assert os.listdir(path.parent) == []


def test_a_full_disk_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: object) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(StoreError, match="No space left on device"), hold_lease(path):
            pass
    assert os.listdir(path.parent) == []
    with hold_lease(path):
        monkeypatch.setattr(Path, "write_text", full)  # while it is held: it is given back all the same
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("half_done", [1, 2])
def test_a_takeover_that_was_killed_is_itself_taken_over(path: Path, half_done: int) -> None:
    """A process that had the right to end a lease was killed before it did; or one that was to end that right."""
    kill_a_holder(path)
    token = json.loads(path.read_text())["token"]
    for _ in range(half_done):
        claim = path.with_name(f"{path.name}.{token}.end")
        kill_a_holder(claim)
        token = json.loads(claim.read_text())["token"]
    with hold_lease(path) as lease:
        lease.check()
        assert os.listdir(path.parent) == [path.name]
    assert os.listdir(path.parent) == []


_CONTEST = """
import os, pathlib, sys, time
from wsi_engine.errors import BusyError
from wsi_engine.lease import hold_lease
path, rounds = pathlib.Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
inside = path.with_name("inside")
number = 0
while number < rounds:
    if sys.argv[3] == "stale":  # wait for the next lease of a process that is gone
        while not path.with_name(f"round-{number}").exists():
            time.sleep(0.001)
    try:
        with hold_lease(path, pause=None) as lease:
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where another is inside
            with open(path.with_name("wins"), "a") as wins:
                wins.write(f"{number}\\n")
            if sys.argv[3] == "stale":
                while not path.with_name(f"round-{number}.over").exists():
                    time.sleep(0.001)
            lease.check()
            inside.unlink()
    except BusyError:
        if sys.argv[3] == "free":
            continue
    number += 1
    with open(path.with_name("tries"), "a") as tries:
        tries.write(f"{number}\\n")  # won, or not
"""


@pytest.fixture
def contest(path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Twelve processes that are to take the same lease."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def begin(processes: list[subprocess.Popen[str]], path: Path, rounds: int, kind: str) -> None:
    for _ in range(12):
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", _CONTEST, str(path), str(rounds), kind],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def wait_for_lines(path: Path, count: int) -> list[str]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        lines = path.read_text().split() if path.exists() else []
        if len(lines) >= count:
            return lines
        time.sleep(0.005)
    raise AssertionError(f"{path.name}: {len(lines)} of {count}")


def test_many_processes_never_hold_one_lease_together(path: Path, contest: list[subprocess.Popen[str]]) -> None:
    begin(contest, path, 20, "free")
    for process in contest:
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, "")
    assert sorted(map(int, path.with_name("wins").read_text().split())) == [n // 12 for n in range(12 * 20)]
    assert set(os.listdir(path.parent)) == {"wins", "tries"}


def test_exactly_one_of_many_takes_over(path: Path, contest: list[subprocess.Popen[str]]) -> None:
    rounds = 12
    begin(contest, path, rounds, "stale")
    dead = json.dumps(vars(Holder.this_process()) | {"started": "1"})
    for number in range(rounds):
        path.write_text(dead.replace('"token": "', f'"token": "{number:02}'))
        path.with_name(f"round-{number}").touch()
        wait_for_lines(path.with_name("tries"), (number + 1) * len(contest) - 1)  # all but the one that holds it
        path.with_name(f"round-{number}.over").touch()
        wait_for_lines(path.with_name("tries"), (number + 1) * len(contest))
    for process in contest:
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, "")
    assert path.with_name("wins").read_text().split() == [str(number) for number in range(rounds)]
    assert not [name for name in os.listdir(path.parent) if "lease" in name]


_STOPPED = """
import pathlib, sys, time
from wsi_engine import lease
lease.HEARTBEAT_SECONDS = 0.05
with lease.hold_lease(pathlib.Path(sys.argv[1])) as held:
    print("held", flush=True)
    sys.stdin.readline()
    try:
        held.check()
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


def test_a_process_that_was_stopped_notices_what_it_lost(
    path: Path, soon_stale: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsi_engine.holder._place", lambda: "another machine")  # or its state would be known
    with subprocess.Popen(
        [sys.executable, "-c", _STOPPED, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=f"process {process.pid}"), hold_lease(path, pause=patient):
            pass
        process.send_signal(signal.SIGSTOP)
        with hold_lease(path, pause=patient) as mine:
            process.send_signal(signal.SIGCONT)
            process.stdin.write("go\n")
            process.stdin.flush()
            said = process.stdout.readline()
            assert said.startswith("BusyError a was taken over by process")
            process.wait(timeout=30)
            mine.check()  # and it neither touched nor removed the lease of the other
    assert os.listdir(path.parent) == []
