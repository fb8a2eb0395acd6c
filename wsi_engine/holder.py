"""Who holds a lease, and whether that process lives, as far as can be told from here."""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ended", "running", "unknown"]


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        host: name of the machine, for messages alone: names are not unique.
        place: where process numbers mean the same: one boot of one machine, one namespace of processes on it.
        pid: number of the process.
        started: its start time, so that a reused number is noticed.
        token: drawn for each lease.
        job: what is being made, by its place in the store; empty where it is not said.
    """

    host: str
    place: str
    pid: int
    started: str
    token: str
    job: str = ""

    @classmethod
    def this_process(cls, job: str = "") -> Holder:
        """This process, with a new token."""
        return cls(socket.gethostname(), _place(), os.getpid(), _start_time(os.getpid()), uuid.uuid4().hex, job)

    @property
    def state(self) -> State:
        """What can be told from here: nothing of the processes of another machine or container.

        Nor of one that is stopped (SIGSTOP, Ctrl-Z): it may never go on, so its heartbeat is watched like theirs.
        """
        if self.place != _place():
            return "unknown"
        if _start_time(self.pid) != self.started:
            return "ended"
        return "unknown" if _is_stopped(self.pid) else "running"


def _place() -> str:
    """One boot of one machine, and one namespace of processes there; without /proc, the name of the machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_time(pid: int) -> str:
    """When a process of this machine started, in ticks since its boot; empty where it is not running."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if Path("/proc/self/stat").exists() else _running(pid)
    return "" if state in "ZX" else rest[18]


def _is_stopped(pid: int) -> bool:
    """Whether a process of this machine was stopped by a signal; False where the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def _running(pid: int) -> str:
    """Where /proc does not tell start times: whether the process runs at all."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "running"
