"""One writer at a time for each slide: a lease file with a heartbeat."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from wsi_engine.errors import BusyError, StoreError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 90.0
"""A lease whose file was not touched for this long belongs to a process that is gone."""

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""What file systems say that know no hard links."""


@dataclass(frozen=True)
class _Holder:
    """Who holds a lease. ``started`` is the process's start time, so that a reused process number is noticed."""

    host: str
    pid: int
    started: str
    token: str

    @classmethod
    def this_process(cls) -> _Holder:
        return cls(socket.gethostname(), os.getpid(), _start_time(os.getpid()), uuid.uuid4().hex)

    def is_gone(self) -> bool:
        """Whether the holder is known to have ended; only a process of this host can be known."""
        return self.host == socket.gethostname() and _start_time(self.pid) != self.started


@contextmanager
def hold_lease(path: Path) -> Iterator[None]:
    """Hold the lease at ``path`` for the ``with`` block; its folder must exist.

    The file is made with O_EXCL, so only one process gets it, and touched every :data:`HEARTBEAT_SECONDS`. The lease of
    a process that was killed is taken over: at once on the same host, elsewhere after :data:`STALE_SECONDS`.

    Raises:
        BusyError: another process holds it.
        StoreError: the folder cannot be written.
    """
    me = _Holder.this_process()
    try:
        if not _create(path, me):
            _take_over(path, me)
    except OSError as error:
        raise StoreError(f"cannot write {path.parent}: {error.strerror or error}") from error
    done = threading.Event()
    beat = threading.Thread(target=_keep_touching, args=(path, done), name="lease", daemon=True)
    beat.start()
    try:
        yield
    finally:
        done.set()
        beat.join()
        if _read(path) == me:
            path.unlink(missing_ok=True)


def _create(path: Path, me: _Holder) -> bool:
    """Make the lease file with its content in one step; False where there is one."""
    draft = path.with_name(f"{path.name}.{me.token}")
    draft.write_text(json.dumps(asdict(me)))
    try:
        os.link(draft, path)  # unlike open and write, never seen half-written; fails where the name exists
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_in_place(path, me)
    finally:
        draft.unlink(missing_ok=True)
    return True


def _create_in_place(path: Path, me: _Holder) -> bool:
    """The same on file systems without hard links (exFAT, some network shares): for an instant the file is empty."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as stream:
        stream.write(json.dumps(asdict(me)))
    return True


def _take_over(path: Path, me: _Holder) -> None:
    """Replace the lease of a process that is gone; BusyError while it is not."""
    holder = _read(path)
    gone = holder is not None and holder.is_gone()
    if not gone and not _is_stale(path):
        who = f"process {holder.pid} on {holder.host}" if holder else "a process that is just beginning"
        raise BusyError(
            f"{path.name.removeprefix('.').removesuffix('.lease')} is being written by {who}: "
            "wait for it to end, or stop it"
        )
    aside = path.with_name(f"{path.name}.{me.token}.old")
    with suppress(FileNotFoundError):  # gone: its holder just ended
        os.rename(path, aside)
    moved = _read(aside)
    if moved is not None and moved != holder:  # someone else took over in between: give theirs back
        with suppress(OSError):  # there is a newer one by now
            os.link(aside, path)
    aside.unlink(missing_ok=True)
    if not _create(path, me):
        raise BusyError(f"{path.name.removeprefix('.').removesuffix('.lease')} was just taken by another process")


def _read(path: Path) -> _Holder | None:
    """The holder named in a lease file, or None where it is missing or unreadable."""
    try:
        return _Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _is_stale(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > STALE_SECONDS
    except FileNotFoundError:
        return True


def _keep_touching(path: Path, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)


def _start_time(pid: int) -> str:
    """When a process of this host started, in its boot's ticks; empty where it is not running or not known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "" if Path("/proc/self/stat").exists() else _running(pid)
    state, start = stat.rpartition(")")[2].split()[0], stat.rpartition(")")[2].split()[19]
    return "" if state in "ZX" else f"{boot}:{start}"


def _running(pid: int) -> str:
    """Where /proc does not tell start times: whether the process runs at all."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "running"
