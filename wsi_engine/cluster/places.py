"""In a worker: which threads and which device are its own, and whether it sees the caller's files."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass

from wsi_engine.errors import ClusterError
from wsi_engine.places import Place, is_url
from wsi_engine.workers import usable_cores

ONE_AT_A_TIME = threading.Lock()
"""Held by a task while it works: encoders and models are for one caller, and a task uses all threads of its worker."""


@dataclass(frozen=True)
class WorkerShare:
    """What a worker may use of its machine.

    Attributes:
        threads: cores; None: those of the machine, divided by ``peers``.
        peers: workers that share them.
        spread_gpus: each local worker takes the GPU that its number names.
    """

    threads: int | None = None
    peers: int = 1
    spread_gpus: bool = False

    def count_threads(self) -> int:
        """Cores that this worker may use, at least 1."""
        return self.threads or max(1, usable_cores() // self.peers)

    def limit_torch(self) -> int:
        """Let torch use them, whatever Dask set for its workers; returns their number."""
        import torch  # noqa: PLC0415

        threads = self.count_threads()
        torch.set_num_threads(threads)
        return threads

    def choose_device(self, device: str) -> str:
        """The device of this worker: one of its own where those of one machine would all take the first GPU."""
        if not self.spread_gpus or device not in ("auto", "cuda"):
            return device
        import torch  # noqa: PLC0415
        from distributed import get_worker  # noqa: PLC0415

        count, name = torch.cuda.device_count(), get_worker().name
        return f"cuda:{name % count}" if count > 1 and isinstance(name, int) else device


def check_shared(folder: Place, mark: str) -> None:
    """Make sure that a folder is the caller's, in which a file of this name is.

    Raises:
        ClusterError: it is not.
    """
    if not (folder / mark).exists():
        raise ClusterError(
            f"a worker on {socket.gethostname()} does not see the output folder {folder}: give one on a file system "
            "that all machines of the cluster share"
        )


def absolute_path(path: str | os.PathLike[str]) -> str:
    """A path that means the same in a worker, whose working folder may be another; URLs do."""
    text = os.fspath(path)
    return text if is_url(text) else os.path.abspath(text)
