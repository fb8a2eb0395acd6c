"""Inputs that mean harm, run where they can do none: a child process with limits, watched from outside.

Every input follows from (target, seed, number), so that a finding can be made again by its number alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 20.0
"""Longest that one input may take on a busy machine; a hang takes for ever."""

MEMORY = 3 << 30
"""Bytes that a target may take beyond what it has after its libraries are loaded."""

STARTING = 240.0
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Target:
    """Something that reads files of others.

    Attributes:
        prepare: writes the sound inputs into a folder and returns what :attr:`mutate` needs.
        mutate: makes a harmful input below a folder, and returns what to give to :attr:`run`.
        run: reads it; errors of ``refusals`` are what is wanted.
        refusals: names of error classes that are right, subclasses included.
    """

    prepare: Callable[[Path], Any]
    mutate: Callable[[Any, Path, np.random.Generator], Any]
    run: Callable[[Any, Path], None]
    refusals: tuple[str, ...] = ("WsiError",)


@dataclass(frozen=True)
class Finding:
    """An input that did what none may do."""

    target: str
    number: int
    kind: str
    detail: str


@dataclass
class Outcome:
    """What came of a run."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)

    @property
    def inputs(self) -> int:
        """How many were run."""
        return sum(self.counts.values())


def make_rng(target: str, seed: int, number: int) -> np.random.Generator:
    """The random numbers of one input."""
    return np.random.default_rng([zlib.crc32(target.encode()), seed, number])


def fuzz(target: str, start: int, stop: int, folder: Path, seed: int = 0, budget: float = 1e9) -> Outcome:
    """Run inputs ``start`` to ``stop`` - 1 of a target in child processes; a new one after a crash or a hang.

    Ends early, between two inputs, when ``budget`` seconds are over.
    """
    outcome = Outcome()
    ends = time.monotonic() + budget
    number = start
    while number < stop and time.monotonic() < ends:
        number = _run_child(target, number, stop, folder, seed, ends, outcome)
    return outcome


def _run_child(target: str, start: int, stop: int, folder: Path, seed: int, ends: float, outcome: Outcome) -> int:
    """One child, until it is done, dies, hangs, or time is over; returns the number to go on with."""
    command = [sys.executable, str(ROOT / "tests/fuzz.py"), "--child", target, str(start), str(stop), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}
    errors = folder / "stderr.txt"
    options: dict[str, Any] = {"cwd": folder, "env": environment, "start_new_session": True}
    with (
        open(errors, "wb") as stream,
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, stderr=stream, **options) as child,
    ):
        assert child.stdout is not None
        current, limit, buffer = -1, STARTING, b""
        try:
            while True:
                ready = select.select([child.stdout], [], [], limit)[0]
                data = os.read(child.stdout.fileno(), 1 << 16) if ready else b""
                if not ready:
                    outcome.findings.append(Finding(target, current, "hang", f"over {limit:g} s"))
                    outcome.counts["hang"] += 1
                    return max(current, start) + 1
                if not data:
                    break
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    current, limit = _take(json.loads(line), target, outcome), SECONDS
                if time.monotonic() > ends:
                    return stop
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
    code = child.returncode
    if code == 0:
        return stop
    said = errors.read_bytes()[-1500:].decode("utf-8", "replace")
    if current < 0:
        raise RuntimeError(f"the target {target} does not read its own sound inputs:\n{said}")
    name = signal.Signals(-code).name if code < 0 else f"exit {code}"
    outcome.findings.append(Finding(target, current, f"crash {name}", said))
    outcome.counts["crash"] += 1
    return max(current, start) + 1


def _take(message: dict[str, Any], target: str, outcome: Outcome) -> int:
    """One line of a child: ``begin``, or how an input ended."""
    number = int(message["number"])
    if "kind" in message:
        outcome.counts[message["kind"]] += 1
        outcome.slowest = max(outcome.slowest, (message["seconds"], number))
        if message["kind"] not in ("read", "refused"):
            outcome.findings.append(Finding(target, number, message["kind"], message["detail"]))
    return number


def run_child(target: Target, name: str, start: int, stop: int, folder: Path, seed: int) -> None:
    """The child's side: read inputs one by one and tell of each on standard output."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive who watches
    where = folder / "sound"
    where.mkdir(exist_ok=True)
    if (folder / "place").exists():  # of a child that died
        _empty(folder / "place")
    sound = target.prepare(where)
    for number in range(-3, 0):  # libraries are loaded by sound inputs before memory is limited
        _run_one(target, sound, folder, make_rng(name, seed, 10**9 + number))
    limit_memory()
    tell = sys.stdout.fileno()
    for number in range(start, stop):
        os.write(tell, json.dumps({"number": number}).encode() + b"\n")
        began = time.monotonic()
        kind, detail = _run_one(target, sound, folder, make_rng(name, seed, number))
        took = round(time.monotonic() - began, 3)
        told = {"number": number, "kind": kind, "detail": detail, "seconds": took}
        os.write(tell, json.dumps(told).encode() + b"\n")


def limit_memory(beyond: int = MEMORY) -> None:
    """Refuse this process more address space than ``beyond`` what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    now = pages * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + beyond, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _run_one(target: Target, sound: Any, folder: Path, rng: np.random.Generator) -> tuple[str, str]:
    """How reading one input ended: read, refused, or what it did that none may do."""
    place = folder / "place"
    place.mkdir(exist_ok=True)
    given = target.mutate(sound, place, rng)
    before = _list_names(folder)
    try:
        target.run(given, place)
        kind, detail = "read", ""
    except Exception as error:
        names = {cls.__name__ for cls in type(error).__mro__}
        kind, detail = "refused", f"{type(error).__name__}: {error}"[:500]
        if not names & set(target.refusals):
            kind, detail = "wrong error", "".join(traceback.format_exception(error))[-3000:]
        elif type(error).__name__ != "InputError" and "\n" in str(error):
            kind = "more than a sentence"
    finally:
        _empty(place)
    escaped = _list_names(folder) - before
    if escaped:
        return "path escape", f"{sorted(escaped)[:5]} after {detail}"
    return kind, detail


def fuzz_here(target: Target, name: str, stop: int, folder: Path, seed: int = 0) -> Outcome:
    """Inputs 0 to ``stop`` - 1 in this process, for targets of Python alone that cannot crash it."""
    sound = folder / "sound"
    sound.mkdir()
    prepared = target.prepare(sound)
    outcome = Outcome()
    for number in range(stop):
        kind, detail = _run_one(target, prepared, folder, make_rng(name, seed, number))
        _take({"number": number, "kind": kind, "detail": detail, "seconds": 0.0}, name, outcome)
    return outcome


def _list_names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} | {f"../{entry.name}" for entry in folder.parent.iterdir()}


def _empty(folder: Path) -> None:
    """Remove what is in a folder, following no link."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            _empty(Path(entry.path))
            os.rmdir(entry.path)
        else:
            os.unlink(entry.path)
