"""What the tests of clusters share: small slides, real worker processes on loopback, and a log of what they did."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wsi_engine.jobs import SlideResult

PRELOAD = Path(__file__).with_name("support_cluster_preload.py")

OPTIONS: dict[str, Any] = {"slide_mpp": 0.5, "tile_px": 48, "batch_size": 8, "reader": "image"}
"""Of an extraction that is quick and has many batches."""


def write_slides(folder: Path, count: int, side: int = 1000) -> Path:
    """Pictures with tissue, each another."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:side, :side]
    for number in range(count):
        noise = np.random.default_rng(number).integers(-12, 13, (side, side, 1))
        inside = (x - side / 2) ** 2 + (y - side / 2) ** 2 < (side * (0.45 - 0.02 * number)) ** 2
        image = np.where(inside[..., None], np.array([210, 130, 180]) + noise, 244)
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / f"slide{number}.png")
    return folder


def data_files(folder: Path) -> dict[str, bytes]:
    """Every data file of the stores in a folder; the attributes hold times and are left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if "c" in path.parts and path.is_file()
    }


@dataclass
class Log:
    """What the workers of a test did."""

    folder: Path

    def batches(self) -> list[tuple[int, str]]:
        """Process and digest of each batch that was encoded."""
        return [(int(pid), digest) for pid, digest in (line.split() for line in self._lines("encoded"))]

    def repeated(self) -> int:
        """Batches that were encoded before."""
        return sum(count - 1 for count in Counter(digest for _, digest in self.batches()).values())

    def finished(self) -> Counter[str]:
        """How often each slide was completed."""
        return Counter(Path(line).stem for line in self._lines("finished"))

    def last_pid(self) -> int:
        """The worker that encoded last."""
        return self.batches()[-1][0]

    def signal_last(self, number: signal.Signals) -> int:
        """Make the worker that encoded last send itself a signal as it is about to write; its process number."""
        pid = self.last_pid()
        draft = self.folder / f"draft-{pid}"
        draft.write_text(str(int(number)))
        draft.rename(self.folder / f"signal-{pid}")
        return pid

    def _lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


@dataclass
class Watcher:
    """A progress that does something once so many tiles are done: each of ``actions`` once, in order."""

    actions: list[tuple[int, Callable[[], object]]] = field(default_factory=list)
    tiles: int = 0
    total: int = 0
    slides: dict[str, int] = field(default_factory=dict)
    ended: list[SlideResult] = field(default_factory=list)

    def run_started(self, slides: int) -> None:
        self.total = slides

    def slide_started(self, slide_id: str, tiles: int, done: int) -> None:
        assert slide_id not in self.slides
        self.slides[slide_id] = tiles
        self.tiles += done

    def tiles_done(self, tiles: int) -> None:
        self.tiles += tiles
        while self.actions and self.tiles >= self.actions[0][0]:
            self.actions.pop(0)[1]()

    def slide_finished(self, result: Any) -> None:
        self.ended.append(result)


def free_port() -> int:
    """A port that nobody uses now, and that no connection is given while its server is away."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


@dataclass
class Processes:
    """A scheduler and workers as an operator starts them."""

    log: Path
    port: int = field(default_factory=free_port)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def start_scheduler(self) -> subprocess.Popen[bytes]:
        return self._start("scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard")

    def start_worker(self, *options: str) -> subprocess.Popen[bytes]:
        return self._start(
            "worker", self.address, "--nthreads", "1", "--no-dashboard", "--memory-limit", "0",
            "--preload", str(PRELOAD), *options,
        )  # fmt: skip

    def wait_for_workers(self, count: int) -> None:
        """Wait until the scheduler answers and has so many."""
        from distributed import Client

        with Client(self.address, timeout=120, set_as_default=False) as client:
            client.wait_for_workers(count, timeout=120)

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {"WSI_TEST_LOG": str(self.log), "OMP_NUM_THREADS": "1"} | self.settings
        command = [sys.executable, "-m", "dask", *words]
        with open(self.log / f"{words[0]}-{len(self.running)}.txt", "wb") as stream:
            process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, cwd=self.log)
        self.running.append(process)
        return process

    def stop(self) -> None:
        for process in self.running:
            process.send_signal(signal.SIGCONT)
            process.kill()
        for process in self.running:
            process.wait()


@contextmanager
def processes(log: Path, **settings: str) -> Iterator[Processes]:
    """Processes that end with the block, whatever happened to them."""
    log.mkdir(parents=True, exist_ok=True)
    group = Processes(log, settings=settings)
    try:
        yield group
    finally:
        group.stop()


def wait_until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for something; fails where it does not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
