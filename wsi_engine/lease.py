"""One writer at a time for each slide: a lease file with a heartbeat.

A lease is the file ``.<name>.lease``, which says who holds it. Three rules make it safe on a shared file system:

* It is made, and taken over, by a hard link (O_EXCL where there are none), which one process alone can make. To take
  over, a process first makes the file ``.<name>.lease.<token>.end``, named after the lease that is to end: of many that
  try, one gets it, and only that one replaces the lease.
* Nobody compares clocks. A holder touches its lease every :data:`HEARTBEAT_SECONDS`; who wants it watches whether the
  file changes, for :data:`STALE_SECONDS` of its own steady clock. A process of the same machine is asked after by its
  number and start time instead, which needs no waiting.
* A holder that stood still (stopped, swapped out, cut off) may have lost its lease without knowing.
  :meth:`Lease.check` reads the file again; writers call it before whatever counts.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from wsi_engine.errors import BusyError, StoreError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 90.0
"""A lease whose file did not change for this long belongs to a process that is gone. Longer than a network file system
keeps what it knows of a file (60 s by NFS's default)."""

LOOK_SECONDS = 1.0
"""Between two looks at a lease that is watched."""

Pause: TypeAlias = Callable[[float], bool]
"""Waits so many seconds; True to give up. ``threading.Event.wait`` is one."""

State = Literal["ended", "running", "unknown"]

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""What file systems say that know no hard links."""


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


@dataclass(frozen=True)
class LeaseSight:
    """A lease file as it was at one moment; it changes whenever its holder shows that it lives."""

    content: bytes
    changed: int

    @classmethod
    def look(cls, path: Path) -> LeaseSight | None:
        """The file now, None where there is none. It is opened, since network file systems refresh what they know then.

        Raises:
            OSError: it cannot be read.
        """
        try:
            with open(path, "rb") as stream:
                return cls(stream.read(), os.fstat(stream.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None

    @property
    def holder(self) -> Holder | None:
        """Who is named in it; None where that cannot be read."""
        try:
            return Holder(**json.loads(self.content))
        except (ValueError, TypeError):
            return None

    @property
    def state(self) -> State:
        """Of its holder."""
        return self.holder.state if self.holder else "unknown"

    @property
    def token(self) -> str:
        """Of its holder, or drawn from the content."""
        return self.holder.token if self.holder else hashlib.sha256(self.content).hexdigest()[:32]

    @property
    def who(self) -> str:
        """The holder for messages."""
        return f"process {self.holder.pid} on {self.holder.host}" if self.holder else "a process that is just beginning"


class Lease:
    """A lease that this process holds, or held: :meth:`check` tells."""

    def __init__(self, path: Path, me: Holder) -> None:
        self._path, self._me = path, me
        self._done = threading.Event()
        self._beat = threading.Thread(target=self._keep_beating, name="lease", daemon=True)

    def check(self) -> None:
        """Make sure that the lease is still this process's; to be called before anything is written that counts.

        Raises:
            BusyError: another process took it over while this one stood still, or its file is gone.
            StoreError: it cannot be read.
        """
        try:
            sight = self._renew()
        except OSError as error:
            raise StoreError(f"cannot read the lease {self._path}: {error.strerror or error}") from error
        if sight is None:
            raise BusyError(
                f"the lease of {_title(self._path)} is gone: another process took it over while this one stood still, "
                "and has ended by now, or it was deleted; nothing more is written here: run again for what is missing"
            )
        if sight.holder != self._me:
            raise BusyError(
                f"{_title(self._path)} was taken over by {sight.who} while this process stood still: "
                "nothing more is written here; the other one goes on with it"
            )

    def _renew(self) -> LeaseSight | None:
        """Look at the file, and touch it if it is ours: the very file that was read, whatever has its name by now."""
        try:
            with open(self._path, "rb") as stream:
                sight = LeaseSight(stream.read(), os.fstat(stream.fileno()).st_mtime_ns)
                if sight.holder == self._me:
                    with suppress(OSError):  # a full or read-only disk: it is ours all the same
                        os.utime(stream.fileno() if os.utime in os.supports_fd else self._path)
                return sight
        except FileNotFoundError:
            return None

    def _keep_beating(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # out of reach for now: who writes will notice
                sight = self._renew()
                if sight is None or sight.holder != self._me:
                    return

    def _start(self) -> None:
        self._beat.start()

    def _end(self) -> None:
        """Give it back, if it is still ours and nobody is taking it over."""
        self._done.set()
        self._beat.join()
        with suppress(OSError):
            sight = LeaseSight.look(self._path)
            if sight is None or sight.holder != self._me:
                return
            try:
                claims = _claim(self._path, self._me.token)
            except OSError:  # no room for another file
                claims = []
            if claims is not None:
                self._path.unlink(missing_ok=True)
                _remove(claims)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


@contextmanager
def hold_lease(path: Path, job: str = "", pause: Pause | None = _sleep) -> Iterator[Lease]:
    """Hold the lease at ``path`` for the ``with`` block; its folder must exist.

    The lease of a process of this machine that ended is taken over at once. That of a process elsewhere is watched: as
    soon as it changes its holder is alive, and after :data:`STALE_SECONDS` without a change it is taken over.

    Args:
        path: the file.
        job: what is to be made, by its place in the store, for those who look.
        pause: waits between two looks, and gives up where it returns True; None: a lease that would have to be watched
            is refused, and the time until the next call with it counts as watched.

    Raises:
        BusyError: another process holds it.
        StoreError: the folder cannot be written.
    """
    me = Holder.this_process(job)
    try:
        _acquire(path, me, pause)
    except OSError as error:
        raise StoreError(f"cannot write {path.parent}: {error.strerror or error}") from error
    lease = Lease(path, me)
    lease._start()
    try:
        yield lease
    finally:
        lease._end()


def _acquire(path: Path, me: Holder, pause: Pause | None) -> None:
    """Make the lease, or take it over; BusyError while its holder may live."""
    while not _create(path, me):
        sight = LeaseSight.look(path)
        if sight is None:  # its holder just ended
            continue
        before, idle = _watch(path, sight)
        state = sight.state
        if state == "ended" or (state == "unknown" and idle >= STALE_SECONDS):
            if _replace(path, sight, me):
                return
            raise BusyError(f"{_title(path)} was just taken by another process")
        alive = state == "running" or before not in (None, sight)
        if alive or pause is None or pause(min(LOOK_SECONDS, STALE_SECONDS / 5)):
            raise BusyError(f"{_title(path)} is being written by {sight.who}: wait for it to end, or stop it")


_sights: dict[str, tuple[LeaseSight, float]] = {}
"""Leases of others by their path: as last seen, and since when (by the steady clock) they look so."""


def _watch(path: Path, sight: LeaseSight) -> tuple[LeaseSight | None, float]:
    """How the file looked the last time, and for how many seconds it has been as it is."""
    now = time.monotonic()
    before, since = _sights.get(str(path), (None, now))
    if before != sight:
        since = now
        _sights[str(path)] = sight, since
    return before, now - since


def _replace(path: Path, sight: LeaseSight, me: Holder) -> bool:
    """Put our lease in the place of one whose holder is gone; False where another process does so."""
    claims = _claim(path, sight.token)
    if claims is None:
        return False
    try:
        now = LeaseSight.look(path)
        if now is None:
            return _create(path, me)
        if now != sight:  # another process was faster, or its holder woke up
            return False
        draft = _write_draft(path, me)
        try:
            os.replace(draft, path)
        except FileNotFoundError:  # NFS repeats a call whose answer was lost, and then finds it done
            return _is_ours(path, me)
        finally:
            draft.unlink(missing_ok=True)
        return True
    finally:
        _remove(claims)


def _claim(path: Path, token: str) -> list[Path] | None:
    """The right to end the lease with this token, which one process alone gets: the files that stand for it, or None.

    Where a process that had it ended half-way, its claim is ended in the same manner. A token never comes again, so
    that who comes late cannot meet a claim on another lease of the same name.
    """
    claim = path.with_name(f"{path.name}.{token}.end")
    if _create(claim, Holder.this_process()):
        return [claim]
    sight = LeaseSight.look(claim)
    if sight is None:
        return None
    _, idle = _watch(claim, sight)
    if sight.state == "ended" or (sight.state == "unknown" and idle >= STALE_SECONDS):
        further = _claim(path, sight.token)
        return None if further is None else [*further, claim]
    return None


def _create(path: Path, me: Holder) -> bool:
    """Make a file that names its holder, with its content in one step; False where there is one."""
    draft = _write_draft(path, me)
    try:
        os.link(draft, path)  # unlike open and write, never seen half-written; fails where the name exists
    except FileExistsError:
        return _is_ours(path, me)  # NFS repeats a call whose answer was lost, and then finds the file there
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_in_place(path, me)
    finally:
        draft.unlink(missing_ok=True)
    return True


def _create_in_place(path: Path, me: Holder) -> bool:
    """The same on file systems without hard links (exFAT, some network shares): for an instant the file is empty."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(json.dumps(asdict(me)))
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _write_draft(path: Path, me: Holder) -> Path:
    draft = path.with_name(f"{path.name}.{me.token}.draft")
    try:
        draft.write_text(json.dumps(asdict(me)))
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    return draft


def _is_ours(path: Path, me: Holder) -> bool:
    sight = LeaseSight.look(path)
    return sight is not None and sight.holder == me


def _remove(claims: list[Path]) -> None:
    for claim in claims:
        with suppress(OSError):
            claim.unlink(missing_ok=True)


def _title(path: Path) -> str:
    """What a lease is on."""
    return path.name.removeprefix(".").removesuffix(".lease")


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
