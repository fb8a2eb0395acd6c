"""One process at a time writes a slide: a lease with a heartbeat.

A lease is the file (or object) ``.<name>.lease``, which says who holds it. Three rules make it safe on a shared file
system and in an object store:

* It is made, and taken over, by a step that one process alone can take (:mod:`wsi_engine.leaserecord`). To take over, a
  process first makes ``.<name>.lease.<token>.end``, named after the lease that is to end: of many that try, one gets
  it, and only that one replaces the lease.
* Nobody compares clocks. A holder shows every :data:`HEARTBEAT_SECONDS` that it lives; who wants the lease watches
  whether it changes, for :data:`STALE_SECONDS` of its own steady clock. A process of the same machine is asked after by
  its number and start time instead, which needs no waiting.
* A holder that stood still (stopped, swapped out, cut off) may have lost its lease without knowing.
  :meth:`Lease.check` reads it again; writers call it before whatever counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeAlias

from wsi_engine.errors import BusyError, StoreError
from wsi_engine.holder import Holder
from wsi_engine.leaserecord import LeaseRecord, LeaseSight, lease_record
from wsi_engine.places import Place

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 90.0
"""A lease that did not change for this long belongs to a process that is gone. Longer than a network file system
keeps what it knows of a file (60 s by NFS's default)."""

LOOK_SECONDS = 1.0
"""Between two looks at a lease that is watched."""

Pause: TypeAlias = Callable[[float], bool]
"""Waits so many seconds; True to give up. ``threading.Event.wait`` is one."""


class Lease:
    """A lease that this process holds, or held: :meth:`check` tells."""

    def __init__(self, place: Place, me: Holder) -> None:
        self._place, self._me = place, me
        self._record = lease_record(place)
        self._done = threading.Event()
        self._beat = threading.Thread(target=self._keep_beating, name="lease", daemon=True)

    def check(self) -> None:
        """Make sure that the lease is still this process's; to be called before anything is written that counts.

        Raises:
            BusyError: another process took it over while this one stood still, or it is gone.
            StoreError: it cannot be read.
        """
        try:
            sight = self._record.renew(self._me)
        except OSError as error:
            raise StoreError(f"cannot read the lease {self._place}: {error.strerror or error}") from error
        if sight is None:
            raise BusyError(
                f"the lease of {_title(self._place)} is gone: another process took it over while this one stood still, "
                "and has ended by now, or it was deleted; nothing more is written here: run again for what is missing"
            )
        if sight.holder != self._me:
            raise BusyError(
                f"{_title(self._place)} was taken over by {sight.who} while this process stood still: "
                "nothing more is written here; the other one goes on with it"
            )

    def _keep_beating(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # out of reach for now: who writes will notice
                sight = self._record.renew(self._me)
                if sight is None or sight.holder != self._me:
                    return

    def _start(self) -> None:
        self._beat.start()

    def _end(self) -> None:
        """Give it back, if it is still ours and nobody is taking it over."""
        self._done.set()
        self._beat.join()
        with suppress(OSError):
            sight = self._record.look()
            if sight is None or sight.holder != self._me:
                return
            try:
                claims = _claim(self._record, self._me.token)
            except OSError:  # no room for another file
                claims = []
            if claims is not None:
                self._record.remove()
                _remove(claims)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


@contextmanager
def hold_lease(place: Place, job: str = "", pause: Pause | None = _sleep) -> Iterator[Lease]:
    """Hold the lease at ``place`` for the ``with`` block; its folder must exist.

    The lease of a process of this machine that ended is taken over at once. That of a process elsewhere is watched: as
    soon as it changes its holder is alive, and after :data:`STALE_SECONDS` without a change it is taken over.

    Args:
        place: the file or object.
        job: what is to be made, by its place in the store, for those who look.
        pause: waits between two looks, and gives up where it returns True; None: a lease that would have to be watched
            is refused, and the time until the next call with it counts as watched.

    Raises:
        BusyError: another process holds it.
        StoreError: the folder cannot be written, or its server knows no conditional puts.
    """
    me = Holder.this_process(job)
    try:
        _acquire(place, me, pause)
    except OSError as error:
        raise StoreError(f"cannot write {place.parent}: {error.strerror or error}") from error
    lease = Lease(place, me)
    lease._start()
    try:
        yield lease
    finally:
        lease._end()


def _acquire(place: Place, me: Holder, pause: Pause | None) -> None:
    """Make the lease, or take it over; BusyError while its holder may live."""
    record = lease_record(place)
    while not record.create(me):
        sight = record.look()
        if sight is None:  # its holder just ended
            continue
        before, idle = _watch(record, sight)
        state = sight.state
        if state == "ended" or (state == "unknown" and idle >= STALE_SECONDS):
            if _replace(record, sight, me):
                return
            raise BusyError(f"{_title(place)} was just taken by another process")
        alive = state == "running" or before not in (None, sight)
        if alive or pause is None or pause(min(LOOK_SECONDS, STALE_SECONDS / 5)):
            raise BusyError(f"{_title(place)} is being written by {sight.who}: wait for it to end, or stop it")


_sights: dict[str, tuple[LeaseSight, float]] = {}
"""Leases of others by their place: as last seen, and since when (by the steady clock) they look so."""


def _watch(record: LeaseRecord, sight: LeaseSight) -> tuple[LeaseSight | None, float]:
    """How the lease looked the last time, and for how many seconds it has been as it is."""
    now = time.monotonic()
    before, since = _sights.get(str(record.path), (None, now))
    if before != sight:
        since = now
        _sights[str(record.path)] = sight, since
    return before, now - since


def _replace(record: LeaseRecord, sight: LeaseSight, me: Holder) -> bool:
    """Put our lease in the place of one whose holder is gone; False where another process does so."""
    claims = _claim(record, sight.token)
    if claims is None:
        return False
    try:
        now = record.look()
        if now is None:
            return record.create(me)
        if now != sight:  # another process was faster, or its holder woke up
            return False
        return record.replace(sight, me)
    finally:
        _remove(claims)


def _claim(record: LeaseRecord, token: str) -> list[LeaseRecord] | None:
    """The right to end the lease with this token, which one process alone gets: what stands for it, or None.

    Where a process that had it ended half-way, its claim is ended in the same manner. A token never comes again, so
    that who comes late cannot meet a claim on another lease of the same name.
    """
    claim = record.claim(token)
    if claim.create(Holder.this_process()):
        return [claim]
    sight = claim.look()
    if sight is None:
        return None
    _, idle = _watch(claim, sight)
    if sight.state == "ended" or (sight.state == "unknown" and idle >= STALE_SECONDS):
        further = _claim(record, sight.token)
        return None if further is None else [*further, claim]
    return None


def _remove(claims: list[LeaseRecord]) -> None:
    for claim in claims:
        with suppress(OSError):
            claim.remove()


def _title(place: Place) -> str:
    """What a lease is on."""
    return place.name.removeprefix(".").removesuffix(".lease")
