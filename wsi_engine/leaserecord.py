"""Where a lease is kept: as a file, or as an object of an object store.

Both know the same few steps. In one of them, making the lease where there is none, one process alone succeeds of many
that try: for files that is a hard link (O_EXCL where there are none), for objects a conditional put.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from wsi_engine.errors import StoreError
from wsi_engine.holder import Holder, State
from wsi_engine.places import Place, RemotePath

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""What file systems say that know no hard links."""


@dataclass(frozen=True)
class LeaseSight:
    """A lease as it was at one moment; it changes whenever its holder shows that it lives.

    Attributes:
        content: who holds it, as JSON.
        changed: when its holder last showed that it lives, in nanoseconds since 1970 by a clock that may be another's.
    """

    content: bytes
    changed: int

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


class LeaseRecord(Protocol):
    """A lease, or the right to end one, where it is kept. Every method may raise OSError."""

    @property
    def path(self) -> Place:
        """Where."""
        ...

    def look(self) -> LeaseSight | None:
        """What is there now; None where there is none."""
        ...

    def create(self, me: Holder) -> bool:
        """Make it, with its content in one step; False where there is one that is not ours."""
        ...

    def replace(self, had: LeaseSight, me: Holder) -> bool:
        """Put ours in the place of the one there is; whether it is ours now. The caller alone has the right to."""
        ...

    def renew(self, me: Holder) -> LeaseSight | None:
        """Look, and where it is ours show that its holder lives."""
        ...

    def remove(self) -> None:
        """Take it away, if it is there."""
        ...

    def claim(self, token: str) -> LeaseRecord:
        """The right to end the lease with this token, itself kept like a lease."""
        ...


class LeaseFile:
    """A lease as a file; its holder touches it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def look(self) -> LeaseSight | None:
        """It is opened, since network file systems refresh what they know of a file then."""
        try:
            with open(self.path, "rb") as stream:
                return LeaseSight(stream.read(), os.fstat(stream.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None

    def create(self, me: Holder) -> bool:
        """By a hard link to a draft."""
        draft = self._write_draft(me)
        try:
            os.link(draft, self.path)  # unlike open and write, never seen half-written; fails where the name exists
        except FileExistsError:
            return self._is_of(me)  # NFS repeats a call whose answer was lost, and then finds the file there
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._create_in_place(me)
        finally:
            draft.unlink(missing_ok=True)
        return True

    def replace(self, had: LeaseSight, me: Holder) -> bool:
        """By renaming a draft."""
        draft = self._write_draft(me)
        try:
            os.replace(draft, self.path)
        except FileNotFoundError:  # NFS repeats a call whose answer was lost, and then finds it done
            return self._is_of(me)
        finally:
            draft.unlink(missing_ok=True)
        return True

    def renew(self, me: Holder) -> LeaseSight | None:
        """The very file that was read is touched, whatever has its name by now."""
        try:
            with open(self.path, "rb") as stream:
                sight = LeaseSight(stream.read(), os.fstat(stream.fileno()).st_mtime_ns)
                if sight.holder == me:
                    with suppress(OSError):  # a full or read-only disk: it is ours all the same
                        os.utime(stream.fileno() if os.utime in os.supports_fd else self.path)
                return sight
        except FileNotFoundError:
            return None

    def remove(self) -> None:
        """One file."""
        self.path.unlink(missing_ok=True)

    def claim(self, token: str) -> LeaseFile:
        """A file beside it."""
        return LeaseFile(self.path.with_name(f"{self.path.name}.{token}.end"))

    def _create_in_place(self, me: Holder) -> bool:
        """The same where there are no hard links (exFAT, some network shares): for an instant the file is empty."""
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w") as stream:
                stream.write(json.dumps(asdict(me)))
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _write_draft(self, me: Holder) -> Path:
        draft = self.path.with_name(f"{self.path.name}.{me.token}.draft")
        try:
            draft.write_text(json.dumps(asdict(me)))
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        return draft

    def _is_of(self, me: Holder) -> bool:
        sight = self.look()
        return sight is not None and sight.holder == me


class LeaseObject:
    """A lease as an object, made by a conditional put.

    An object cannot be touched, and who writes it again may overwrite that of another. So each holder has a second
    object of its own, ``<name>.<token>.beat``, with the time of its last heartbeat.
    """

    def __init__(self, path: RemotePath) -> None:
        self.path = path

    def look(self) -> LeaseSight | None:
        """Lease and heartbeat."""
        try:
            sight = LeaseSight(self.path.read_bytes(), 0)
        except FileNotFoundError:
            return None
        with suppress(FileNotFoundError, ValueError):
            return LeaseSight(sight.content, int(self._beat(sight.token).read_bytes()))
        return sight

    def create(self, me: Holder) -> bool:
        """By a conditional put, of which it is made sure once that the server knows them."""
        if self.look() is not None:  # the put decides, but who waits asks again and again
            return False
        content, made = _encode(me), False
        self._show(me)
        try:
            made = self.path.create_bytes(content) or self._is_of(me)  # its answer was lost, and it was put again
            if made:
                self._prove(content)
        except BaseException:  # or others would take it for held as long as this process lives
            with suppress(OSError):
                if self._is_of(me):
                    self.path.unlink(missing_ok=True)
            made = False
            raise
        finally:
            if not made:
                with suppress(OSError):
                    self._beat(me.token).unlink(missing_ok=True)
        return made

    def _prove(self, content: bytes) -> None:
        """See once for a folder that its server refuses to put the lease where there is one.

        Raises:
            StoreError: it does not.
        """
        bucket = self.path.parent
        with _proving:
            if bucket not in _proven and self.path.create_bytes(content):
                raise StoreError(
                    f"the server of {bucket} puts objects where there are some although it is asked not to, so that "
                    "two processes could write one slide: use a server with conditional puts (If-None-Match)"
                )
            _proven.add(bucket)

    def replace(self, had: LeaseSight, me: Holder) -> bool:
        """By an ordinary put."""
        self._show(me)
        self.path.write_bytes(_encode(me))
        self._beat(had.token).unlink(missing_ok=True)
        return True

    def renew(self, me: Holder) -> LeaseSight | None:
        """The heartbeat is not looked at."""
        try:
            sight = LeaseSight(self.path.read_bytes(), 0)
        except FileNotFoundError:
            return None
        if sight.holder == me:
            with suppress(OSError):  # the next one may get through
                self._show(me)
        return sight

    def remove(self) -> None:
        """Lease and heartbeat."""
        try:
            token = LeaseSight(self.path.read_bytes(), 0).token
        except FileNotFoundError:
            return
        self.path.unlink(missing_ok=True)
        self._beat(token).unlink(missing_ok=True)

    def claim(self, token: str) -> LeaseObject:
        """An object beside it."""
        return LeaseObject(self.path.with_name(f"{self.path.name}.{token}.end"))

    def _show(self, me: Holder) -> None:
        self._beat(me.token).write_bytes(str(time.time_ns()).encode())

    def _beat(self, token: str) -> RemotePath:
        return self.path.with_name(f"{self.path.name}.{token}.beat")

    def _is_of(self, me: Holder) -> bool:
        sight = self.look()
        return sight is not None and sight.holder == me


_proven: set[RemotePath] = set()
"""Folders whose server was seen to refuse a conditional put."""

_proving = threading.Lock()


def lease_record(place: Place) -> LeaseRecord:
    """The lease that is kept at a place, whether there is one now or not."""
    return LeaseObject(place) if isinstance(place, RemotePath) else LeaseFile(place)


def _encode(me: Holder) -> bytes:
    return json.dumps(asdict(me)).encode()
