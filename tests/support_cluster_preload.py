"""Loaded by the worker processes of tests: slows the texture encoder and the nuclei, and writes down what is done.

The folder ``WSI_TEST_LOG`` gets ``encoded`` (process and digest of each batch), ``finished`` (each store completed).
A process for which ``signal-PID`` lies there sends itself the signal named in it, right after a look at its lease: that
is the worst moment, since what it writes next is written whatever became of the lease.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("WSI_TEST_LOG", "."))
SECONDS = float(os.environ.get("WSI_TEST_SECONDS", "0.03"))


def note(name: str, text: str) -> None:
    """Append a line in one write."""
    descriptor = os.open(FOLDER / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{text}\n".encode())
    os.close(descriptor)


def dask_setup(worker: Any) -> None:
    """Called by Dask once the worker is there."""
    from wsi_engine import lease
    from wsi_engine.encoders.texture import TextureEncoder
    from wsi_engine.jobs import SlideJob
    from wsi_engine.writer import FeatureWriter

    if "WSI_TEST_STALE" in os.environ:
        lease.STALE_SECONDS, lease.HEARTBEAT_SECONDS = float(os.environ["WSI_TEST_STALE"]), 0.3
    plain_encode, plain_finish, plain_begin = TextureEncoder.encode, FeatureWriter.finish, SlideJob.begin
    plain_check = lease.Lease.check

    def encode(self: Any, pixels: Any) -> Any:
        note("encoded", f"{os.getpid()} {hashlib.sha256(pixels.tobytes()).hexdigest()}")
        time.sleep(SECONDS)
        return plain_encode(self, pixels)

    def finish(self: Any, seconds: Any) -> None:
        plain_finish(self, seconds)
        note("finished", self._store.path)

    def begin(self: Any) -> None:
        if "poison" in str(self._path):
            os._exit(1)
        plain_begin(self)

    def check(self: Any) -> None:
        plain_check(self)
        with suppress(FileNotFoundError):
            order = FOLDER / f"signal-{os.getpid()}"
            number = int(order.read_text())
            order.unlink()
            os.kill(os.getpid(), number)

    lease.Lease.check = check  # type: ignore[method-assign]
    TextureEncoder.encode, FeatureWriter.finish, SlideJob.begin = encode, finish, begin  # type: ignore[method-assign]
