"""HDF5 files of others, looked through in another process first: the library can crash or go round for ever in them.

Its attributes and indices are read there, and a first and last row; what hangs or crashes that process is refused.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

SECONDS = 15.0
"""Longest that one file may take."""

_STARTING = 120.0
_READY = b"ready\n"


class _Prober:
    """The other process, which looks through one file at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def check(self, path: Path) -> str:
        """Why a file cannot be read; empty where nothing speaks against it.

        Raises:
            FormatError: the other process cannot be started.
        """
        with self._lock:
            stdin, stdout = self._start()
            try:
                stdin.write(json.dumps(str(path.resolve())).encode() + b"\n")
                stdin.flush()
                answer = _answer(stdout, SECONDS)
            except OSError:
                answer = b""
            if answer == b"done\n":
                return ""
            self.stop()
            return "HDF5's library does not end reading it" if answer is None else "HDF5's library crashes on it"

    def _start(self) -> tuple[IO[bytes], IO[bytes]]:
        child = self._child
        if child is None or child.poll() is not None:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            # -P: this folder has modules named like packages; PYTHONPATH counts, for it may be how h5py is found
            child = self._child = subprocess.Popen([sys.executable, "-P", __file__], **pipes)
            assert child.stdout is not None
            if _answer(child.stdout, _STARTING) != _READY:
                from wsi_engine.errors import FormatError  # noqa: PLC0415 - the other process needs this file alone

                self.stop()
                raise FormatError(
                    f"cannot start {sys.executable} to look through HDF5 files before they are read: see that it can "
                    "import h5py"
                )
        assert child.stdin is not None
        assert child.stdout is not None
        return child.stdin, child.stdout

    def stop(self) -> None:
        """End the other process."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    stream.close()


def check_hdf5(path: Path) -> None:
    """Look through a file in another process.

    Raises:
        FormatError: the other process cannot be started.
        ValueError: HDF5's library crashes on it, or does not come to an end; damage of other kinds passes.
    """
    reason = _PROBER.check(path)
    if reason:
        raise ValueError(reason)


def _answer(stream: IO[bytes], seconds: float) -> bytes | None:
    """The next line; empty where the process ended, None where none came in time."""
    if not select.select([stream], [], [], seconds)[0]:
        return None
    return os.read(stream.fileno(), 64)


def _serve() -> None:
    """The other process's side."""
    import h5py  # noqa: PLC0415 - only this side needs it here

    os.write(1, _READY)
    for line in sys.stdin.buffer:
        with suppress(Exception), h5py.File(json.loads(line), "r") as file:  # the reader itself will say it better
            _look_through(file)
        os.write(1, b"done\n")


def _look_through(file: Any) -> None:
    """Attributes, indices, and the first and last row of every dataset at the top."""
    dict(file.attrs)
    for name in file:
        dataset = file[name]
        dict(dataset.attrs)
        if hasattr(dataset, "chunks"):
            dataset.id.get_storage_size()
            if dataset.chunks:
                dataset.id.get_num_chunks()
            if dataset.ndim and len(dataset):
                dataset[:1], dataset[-1:]


_PROBER = _Prober()
atexit.register(_PROBER.stop)

if __name__ == "__main__":
    _serve()
