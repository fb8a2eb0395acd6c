"""Faults on purpose: jobs in processes of their own that are killed, or find the disk full, at some change of a file.

Every change of a file by Python (open for writing, rename, link, remove, make or remove a folder) raises an audit event
(PEP 578); a hook counts those below a folder and strikes at one of them. A server process loads the engine once and
forks a worker for each job, so that a hundred faults take seconds.
"""

from __future__ import annotations

import atexit
import errno
import functools
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wsi_engine import check_stores
from wsi_engine.errors import InputError, WsiError

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}
_REMOVALS = {"os.remove", "os.rmdir"}

DRAFTS = re.compile(r"(\.partial$|^\..*\.\d+$|\.lease(\.[0-9a-f]{32}\.(draft|end))*$)")
"""Names of what a killed process may leave behind."""


@dataclass(frozen=True)
class Outcome:
    """How a job's process ended.

    Attributes:
        killed: by the fault.
        changes: of files below the folder, counted.
        said: its status and message; of an error also ``ours``: whether it is one of the engine's.
    """

    killed: bool
    changes: int
    said: dict[str, Any]


class FaultyJobs:
    """The server of a test module; jobs are functions of this module named ``run_...``."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
        self._server = subprocess.Popen(
            [sys.executable, "-c", "import support_faults; support_faults.serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
        )  # fmt: skip

    def run(self, job: str, folder: Path, *arguments: object, fault: str | int = 0, at: int = 0) -> Outcome:
        """Run a job; ``fault`` is ``kill``, or the number of an error that every change from ``at`` on ends in."""
        call = {"job": job, "folder": str(folder), "arguments": [*map(str, arguments)], "fault": fault, "at": at}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(call) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the server of faults ended"
        return Outcome(**json.loads(answer))

    def close(self) -> None:
        """End the server."""
        self._server.kill()
        self._server.communicate()


@functools.cache
def faulty_jobs(number: int = 0) -> FaultyJobs:
    """A server that all tests share; another number is another server, for jobs that run at the same time."""
    jobs = FaultyJobs()
    atexit.register(jobs.close)
    return jobs


def serve() -> None:
    """Answer calls from standard input, each by a forked process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    warm: set[str] = set()
    for line in sys.stdin:
        call = json.loads(line)
        if call["job"] not in warm:  # whatever loads late is loaded before the first fork
            warm.add(call["job"])
            with tempfile.TemporaryDirectory() as folder, suppress(Exception):
                globals()[f"run_{call['job']}"](Path(folder) / "warm", *call["arguments"])
        counter, result = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            _work(call, counter[1], result[1])
        os.close(counter[1])
        os.close(result[1])
        with os.fdopen(counter[0], "rb") as counts, os.fdopen(result[0]) as results:
            changes, said = len(counts.read()), results.read()
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        answer = {"killed": killed, "changes": changes, "said": json.loads(said or "{}")}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _work(call: dict[str, Any], counter: int, result: int) -> None:
    """The forked process: strike where told, run the job, say how it went."""
    try:
        _strike(call["folder"], call["fault"], call["at"], counter)
        try:
            said = globals()[f"run_{call['job']}"](Path(call["folder"]), *call["arguments"])
        except Exception as error:
            said = {"status": "failed", "message": str(error), "ours": isinstance(error, WsiError)}
        os.write(result, json.dumps(said or {}).encode())
    finally:
        os._exit(0)


def _strike(folder: str, fault: str | int, at: int, counter: int) -> None:
    """Install the hook; a byte for each change goes to ``counter``."""
    lock, seen = threading.Lock(), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if not _changes(event, arguments, folder):
            return
        with lock:
            seen += 1
            os.write(counter, b".")
            if not at or seen < at:
                return
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        elif fault != errno.ENOSPC or event not in _REMOVALS:  # a full disk lets files be removed
            raise OSError(fault, os.strerror(int(fault)))

    sys.addaudithook(hook)


def _changes(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    if event == "open":
        path, _, flags = arguments
        return isinstance(path, str) and path.startswith(folder) and bool(flags & _WRITES)
    if event not in _CHANGES:
        return False
    if event in _REMOVALS and arguments[-1] != -1:  # by name in an open folder, as shutil.rmtree does
        return True
    return os.fspath(arguments[0]).startswith(folder)


# Jobs


class MeanEncoder:
    """Mean and standard deviation of each channel."""

    precision = "fp32"

    def __init__(self, slow: float = 0.0) -> None:
        from wsi_engine.encoders.base import EncoderCard

        self.card = EncoderCard("mean", "timm", "mean", 0, 6, "none", "open", weights="none", weights_digest="1" * 64)
        self._slow = slow

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        time.sleep(self._slow)
        values = pixels.reshape(len(pixels), -1, 3).astype(np.float32) / 255
        return np.concatenate([values.mean(axis=1), values.std(axis=1)], axis=1)


def run_extract(out: Path, slide: str, slow: str = "0", number: str = "") -> dict[str, Any]:
    """Features of one slide or folder, a chunk for every 16 tiles; the number of the process goes to a file."""
    from wsi_engine import extract

    if number:
        Path(number).write_text(str(os.getpid()))
    report = extract(slide, out, MeanEncoder(float(slow)), slide_mpp=0.5, tile_px=32, batch_size=16, dtype="float32")
    ways = [result.status for result in report.results]
    return {"status": ways[0], "message": report.results[0].message, "ways": ways}


def run_impatient(out: Path, slide: str) -> dict[str, Any]:
    """The same by a process that takes every other for one of another machine, and waits for it for a second."""
    from wsi_engine import holder, lease

    holder._place = lambda: "another machine"
    lease.STALE_SECONDS = 1.0
    return run_extract(out, slide)


def run_jumping(out: Path, slide: str, slow: str, jump: str) -> dict[str, Any]:
    """The same with a wall clock that jumps at each look, and heartbeats every 20 ms that are dated by it."""
    from wsi_engine import lease

    clock, touch, jumps = time.time, os.utime, itertools.count()
    time.time = lambda: clock() + float(jump) * (next(jumps) % 3)
    os.utime = lambda path, *_: touch(path, (time.time(), time.time()))
    os.supports_fd.add(os.utime)
    lease.HEARTBEAT_SECONDS = 0.02
    try:
        return run_extract(out, slide, slow)
    finally:
        time.time, os.utime, lease.HEARTBEAT_SECONDS = clock, touch, 10.0


def run_limited(out: Path, slide: str, limit: str) -> dict[str, Any]:
    """The same where no file may have more bytes than ``limit``."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        return run_extract(out, slide)
    finally:  # the server runs it once itself
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def run_train(out: Path, cohort: str) -> dict[str, Any]:
    """ABMIL on tiny bags, with its state written after every epoch."""
    from wsi_engine.cohorts.splits import SplitSettings
    from wsi_engine.training import TrainSettings, train_head
    from wsi_engine.training import fold as fold_module

    fold_module.SAVE_SECONDS = 0.0
    settings = TrainSettings(epochs=3, learning_rate=1e-2, precision="fp32", device="cpu", workers=1)
    splits = SplitSettings(folds=2)
    options = {"hidden": (6,), "attention": 4}
    place = Path(cohort)
    report = train_head(
        place / "cohort.csv", place / "features", "subtype", out, head="abmil", options=options, splits=splits,
        settings=settings,
    )  # fmt: skip
    return {"status": "done" if report.record.complete else "?", "message": ""}


def run_nuclei(out: Path, slide: str) -> dict[str, Any]:
    """Nuclei of a picture by their stain, with every file beside the store."""
    from wsi_engine.nuclei.segmentation import NucleiSettings
    from wsi_engine.nuclei.slides import segment_slides

    settings = NucleiSettings(tile_px=128)
    (result,) = segment_slides(slide, out, "stain", slide_mpp=0.5, settings=settings).results
    return {"status": result.status, "message": result.message}


# What is compared


@dataclass(frozen=True)
class Case:
    """A job, what it works on, and what it makes when nothing disturbs it."""

    job: str
    given: Path
    made: dict[str, bytes]
    changes: int

    @classmethod
    def undisturbed(cls, jobs: FaultyJobs, job: str, given: Path, folder: Path) -> Case:
        """Run it once; a second run changes nothing."""
        first = jobs.run(job, folder, given)
        assert first.said["status"] == "done", first
        made = snapshot(folder)
        assert jobs.run(job, folder, given).said["status"] in ("done", "already complete")
        assert snapshot(folder) == made
        return cls(job, given, made, first.changes)

    def points(self, count: int) -> list[int]:
        """Changes to strike at, evenly from the first to the last but three; threads make a few more or less."""
        return np.unique(np.linspace(1, self.changes - 3, count).round().astype(int)).tolist()

    def kill_everywhere(self, jobs: FaultyJobs, folder: Path, count: int) -> None:
        """Kill at so many points, each in a new folder, and run again."""
        points = self.points(count)
        assert len(points) == count
        for at in points:
            place = folder / f"killed-{at}"
            place.mkdir()
            outcome = jobs.run(self.job, place, self.given, fault="kill", at=at)
            assert outcome.killed or at > self.changes - 10, (at, self.changes, outcome)
            self.assert_resumed(jobs, place)
        assert {one.kind for one in check_stores(folder).findings} <= {"leftover"}

    def assert_resumed(self, jobs: FaultyJobs, folder: Path) -> None:
        """What is there after a fault is not damaged, and one more run makes the same bytes as no fault."""
        if any(folder.iterdir()):
            with suppress(InputError):  # nothing of the engine yet
                damaged = check_stores(folder).damaged
                assert not damaged, damaged
        again = jobs.run(self.job, folder, self.given)
        assert again.said.get("status") in ("done", "already complete"), again
        made = snapshot(folder)
        differing = {name for name in made.keys() | self.made.keys() if made.get(name) != self.made.get(name)}
        assert not differing, differing


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path, without drafts of killed processes and without what took how long."""
    return {
        str(path.relative_to(folder)): _timeless(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not DRAFTS.search(path.name)
    }


def _timeless(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name in ("zarr.json", "run.json"):
        return json.dumps(_without_seconds(json.loads(data)), sort_keys=True).encode()
    if path.suffix == ".jsonl":
        return json.dumps([_without_seconds(json.loads(line)) for line in data.splitlines()]).encode()
    return data


def _without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_seconds(one) for name, one in value.items() if "seconds" not in name}
    return [_without_seconds(one) for one in value] if isinstance(value, list) else value


def draw_tissue(path: Path, width: int = 512, height: int = 384) -> Path:
    """A small picture with pink tissue and dark nuclei on white glass."""
    rng = np.random.default_rng(5)
    rows, columns = np.mgrid[:height, :width]
    picture = np.full((height, width, 3), 243.0)
    inside = (columns - width / 2) ** 2 / (width * 0.45) ** 2 + (rows - height / 2) ** 2 / (height * 0.45) ** 2 < 1
    picture[inside] = (215, 140, 185)
    for x, y in zip(rng.integers(30, width - 30, 60), rng.integers(25, height - 25, 60), strict=True):
        picture[(columns - x) ** 2 + (rows - y) ** 2 < 36] = (90, 60, 140)
    picture += rng.integers(-6, 7, (height, width, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(path)
    return path
