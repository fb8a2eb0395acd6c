"""Which cluster a run is spread over, as the user writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Self

from wsi_engine.errors import SettingsError
from wsi_engine.workers import usable_cores

Kind = Literal["address", "file", "local", "slurm", "client"]

SLURM_JOBS = 4
"""Jobs that are asked of Slurm where no number is given."""

_ADDRESS = re.compile(r"(?:[a-z][a-z0-9+.-]*://\S+|[^\s:/]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5})")


@dataclass(frozen=True)
class ClusterChoice:
    """A Dask cluster, and how it is used.

    Attributes:
        kind: ``address`` of a scheduler that runs, ``file`` that such a scheduler wrote (``--scheduler-file``),
            ``local`` worker processes on this machine, jobs of ``slurm``, or a ``client`` that the caller has.
        address: of the scheduler, or the path of its file.
        workers: local processes, or jobs.
        part_tiles: a slide of which more tiles are missing is spread over several tasks of at most so many.
        reconnect_seconds: how long a scheduler may be away before the run gives up.
        retry_seconds: between two looks at a slide that another process writes.
    """

    kind: Kind
    address: str = ""
    workers: int | None = None
    part_tiles: int = 20_000
    reconnect_seconds: float = 600.0
    retry_seconds: float = 5.0

    def __post_init__(self) -> None:
        if self.kind not in ("address", "file", "local", "slurm", "client"):
            raise SettingsError(f"a cluster is address, file, local, slurm or client, not {self.kind!r}")
        if self.kind in ("address", "file") and not self.address:
            raise SettingsError("--cluster needs the address of a scheduler, such as tcp://node1:8786")
        if self.kind in ("local", "slurm") and (self.workers is None or self.workers < 1):
            raise SettingsError(f"--cluster {self.kind}:N needs at least 1 worker, not {self.workers}")
        if self.part_tiles < 1:
            raise SettingsError(f"tiles of a part must be at least 1, not {self.part_tiles}")
        if not (self.reconnect_seconds >= 0 and self.retry_seconds > 0):
            raise SettingsError("waiting times of a cluster must be above 0 s")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The cluster that ``--cluster`` names: ``local:N``, ``slurm:N``, an address, or a scheduler's file (.json).

        ``local`` alone is a worker for each usable core, ``slurm`` alone :data:`SLURM_JOBS` jobs.

        Raises:
            SettingsError: it is none of these.
        """
        word, colon, number = text.partition(":")
        if word in ("local", "slurm"):
            if not colon:
                return cls("local", workers=usable_cores()) if word == "local" else cls("slurm", workers=SLURM_JOBS)
            if number.isdecimal() and int(number) > 0:
                return cls("local" if word == "local" else "slurm", workers=int(number))
        elif text.endswith(".json"):
            return cls("file", text)
        elif _ADDRESS.fullmatch(text):
            return cls("address", text)
        raise SettingsError(
            f"--cluster {text!r} is no cluster: use local:N, slurm:N, the address of a scheduler "
            "(tcp://HOST:PORT), or its file (.json)"
        )

    def __str__(self) -> str:
        if self.kind in ("local", "slurm"):
            return f"{self.kind}:{self.workers}"
        return self.address or "the given client"
