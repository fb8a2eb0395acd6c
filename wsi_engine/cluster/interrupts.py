"""Signals: Ctrl-C is for the process that started a run, SIGTERM ends it as Ctrl-C does.

Workers of this machine load this module before they begin: the process that started them ends them.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


def dask_setup(worker: Any) -> None:
    """Called by Dask in the main thread of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def keep_interrupts() -> Iterator[None]:
    """Keep what Ctrl-C does: dask-jobqueue, as it loads, makes it end the process without a word and with exit code 0.

    A module that does so can be loaded in the main thread alone.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """For the ``with`` block let SIGTERM interrupt, so that what was started elsewhere is ended.

    Nothing changes outside of the main thread, and where the program does something of its own on SIGTERM.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt
