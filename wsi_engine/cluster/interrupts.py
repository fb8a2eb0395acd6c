"""Loaded by workers of this machine before they begin: Ctrl-C is for the process that started them, which ends them."""

from __future__ import annotations

import signal
from typing import Any


def dask_setup(worker: Any) -> None:
    """Called by Dask in the main thread of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
