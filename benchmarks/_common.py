"""What all benchmarks share: a case, paired timing by medians, and the machine in words."""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Case:
    """Our way against another way of doing the same; ``target`` is the least ratio wanted."""

    name: str
    against: str
    target: float
    ours: Callable[[], object]
    theirs: Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median seconds of both ways, timed in turns in one run."""

    case: Case
    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.theirs / self.ours


def time_pair(case: Case, repeats: int = 5) -> Timing:
    """Time both ways in turns, after one unmeasured call of each, and take medians."""
    case.ours()
    case.theirs()
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(_seconds(case.ours))
        theirs.append(_seconds(case.theirs))
    return Timing(case, statistics.median(ours), statistics.median(theirs))


def run_cases(cases: Iterable[Case], line: Callable[[Timing], str], repeats: int, keep: Path | None) -> None:
    """Time the cases in turn, print a line of each, and keep the figures as JSON where a file is given."""
    rows = []
    for case in cases:
        timing = time_pair(case, repeats)
        print(line(timing), flush=True)
        rows.append({"name": case.name, "against": case.against, "ours": timing.ours, "theirs": timing.theirs})
    if keep:
        keep.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=2))


def parse_options(text: str | None, repeats: int) -> tuple[int, Path | None]:
    """``--repeats`` and ``--json`` of the command line; ``text`` describes the benchmark."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    options = parser.parse_args()
    return options.repeats, options.json


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_memory() -> float:
    """MiB at the peak of this process; ``getrusage`` would tell that of the process that started it, were it larger."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def write_random_store(path: Path, tiles: int, dim: int, seed: int = 0) -> NDArray[np.float16]:
    """A store of random features, as extraction leaves it; returns them, float16 (tiles, dim).

    Its encoder is called ``noise``, its tiles are of 256 px at 0.5 mpp, its slide has the path's name.
    """
    from wsi_engine import FeatureStore, TileGrid  # noqa: PLC0415 - most benchmarks write no store
    from wsi_engine.encoders.base import EncoderCard  # noqa: PLC0415
    from wsi_engine.slide_record import SlideRecord  # noqa: PLC0415
    from wsi_engine.writer import FeatureIdentity, write_features  # noqa: PLC0415

    side, step = 200, 512
    places = np.arange(tiles)
    origins = np.stack([places % side * step, places // side * step], axis=1).astype(np.int64)
    grid = TileGrid(origins, 256, 256, 0.5, (float(step), float(step)), tiles)
    size = side * step, (tiles // side + 1) * step
    record = SlideRecord(path.stem, f"{seed:064x}", size, (0.25, 0.25), "made", "made", "made")
    card = EncoderCard("noise", "imported", "noise", 0, dim, "none", "open", weights_digest="d" * 64)
    features = np.random.default_rng(seed).standard_normal((tiles, dim), np.float32).astype(np.float16)
    store = FeatureStore.create(path, record)
    store.write_grid("g", grid, {"mpp": grid.mpp}, None)
    write_features(store, FeatureIdentity(card, "g", grid, "fp32", "float16"), features, {})
    return features


def describe_machine() -> str:
    """Processor, cores, system and Python in one line."""
    from wsi_engine.workers import usable_cores  # noqa: PLC0415

    name = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return (
        f"{name}, {usable_cores()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}"
    )
