"""Nuclei at slide scale: speed after the method, memory, equality, and GeoJSON: ``python -m benchmarks.nuclei_slide``.

What follows the maps: threshold, opening and closing, joining across seams, splitting, measurement and contours. Memory
is the peak of a process of its own on slides of 10,000² and 40,000² pixels that repeat one picture of dense tissue,
under a tissue mask that lets through a share of it, with a method whose maps cost little.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._common import describe_machine, peak_memory
from wsi_engine.clock import StageClock
from wsi_engine.kernels import set_thread_count
from wsi_engine.memory import keep_freed_memory
from wsi_engine.nuclei.frame import FrameReader, TissueRaster, frame_slide
from wsi_engine.nuclei.instances import InstanceSet
from wsi_engine.nuclei.method import FittedMethod, NucleiMethod, create_method
from wsi_engine.nuclei.seams import SeamJoiner
from wsi_engine.nuclei.segmentation import segment_nuclei
from wsi_engine.nuclei.sheets import SheetSplitter
from wsi_engine.nuclei.stain import measure_haematoxylin
from wsi_engine.nuclei.stain_method import FittedStain, StainMethod
from wsi_engine.nuclei.windows import WindowPlan
from wsi_engine.readers.base import Level, Metadata, RGBImage
from wsi_engine.slide import Slide, open_slide
from wsi_engine.synthetic import SlideSpec, SyntheticSlide
from wsi_engine.tissue import TissueMask

SIDE = 2048
TILED_SIDE = 2624
"""Of the picture whose nuclei are compared over tiles: more than one window of the student along each side."""

GOAL = 32.0
SHARE = 1 / 16
"""Of the slides for memory, the part that is tissue."""


def paint_tissue(side: int = SIDE) -> RGBImage:
    """Dense tissue at 0.25 mpp."""
    return SyntheticSlide(SlideSpec(width=2 * side, height=2 * side, coverage=1, seed=4)).paint(side, side, side, side)


class RepeatingReader:
    """A slide of any size that repeats one picture."""

    name = "repeating"

    def __init__(self, picture: RGBImage, side: int) -> None:
        self._picture = picture
        self.clock = StageClock()
        self.levels = (Level(side, side, 1.0),)
        self.metadata = Metadata("synthetic", (0.25, 0.25), "synthetic")

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGBImage:
        """Pixels of a rectangle within the slide: uint8 (height, width, 3)."""
        rows = np.arange(y, y + height) % len(self._picture)
        columns = np.arange(x, x + width) % self._picture.shape[1]
        return self._picture[rows][:, columns]

    def expect(self, level: int, boxes: NDArray[np.int64]) -> AbstractContextManager[None]:
        """Nothing to prepare."""
        return nullcontext()

    def close(self) -> None:
        """Nothing to close."""


class CheapMethod(StainMethod):
    """The baseline without its local threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.margin_px = 0

    def fit(self, samples: Sequence[NDArray[np.uint8]]) -> FittedStain:
        """A fixed threshold."""
        return _Cheap(self, 0.45)


class _Cheap(FittedStain):
    def foreground(self, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Haematoxylin above the threshold."""
        return np.stack([measure_haematoxylin(window) - np.float32(self.least) for window in windows])[:, None]


@dataclass(frozen=True)
class Timing:
    """What one method takes on :func:`paint_tissue`, in Mpx of 0.25 µm per second of processor time of one thread."""

    maps: float
    after: float
    nuclei: int

    @property
    def share(self) -> float:
        """What follows the maps takes this part of the time that the maps take."""
        return self.maps / self.after


def time_method(name: str, tile_px: int, repeats: int = 7) -> Timing:
    """Time a method's maps, reading included, and what follows them: medians of several, after a first round."""
    method: NucleiMethod = create_method(name, device="cpu")
    mapping, after, nuclei = [], [], 0
    with open_slide(paint_tissue(), 0.25) as slide:
        frame = frame_slide(slide, method.mpp)
        plan = WindowPlan(FrameReader(slide, frame), TissueRaster(frame, slide.mpp, None), method, tile_px)
        fitted = method.fit([slide.read_region(0, 0, *slide.dimensions)])
        for _ in range(3):
            start = time.process_time()
            windows = [window for tile in plan.stream(fitted, 1) for window in tile]
            mapping.append(time.process_time() - start)
        cleaning = _time_cleaning(fitted, windows[0].maps) * len(windows)
        for _ in range(repeats + 1):
            joiner = SeamJoiner(plan.keys, plan.side * method.detail)
            splitter = SheetSplitter(fitted, method.gap_px)
            start, nuclei = time.process_time(), 0
            for window in windows:
                chunks = [splitter.add(pieces) for pieces in joiner.add(window)]
                nuclei += sum(len(chunk) for chunk in chunks if chunk)
            last = splitter.flush()
            nuclei += len(last) if last else 0
            after.append(time.process_time() - start + cleaning)
    pixels = SIDE**2 / 1e6
    middle = statistics.median
    return Timing(pixels / (middle(mapping[1:]) - cleaning), pixels / middle(after[1:]), nuclei)


def _time_cleaning(fitted: FittedMethod, maps: NDArray[np.float32]) -> float:
    maps = np.ascontiguousarray(maps)
    start = time.process_time()
    fitted.mask(maps)
    return time.process_time() - start


def time_default(repeats: int = 4) -> tuple[float, float]:
    """Mpx of 0.25 µm per second of the default method on dense tissue from end to end, best and median of several."""
    picture, seconds = paint_tissue(), []
    method = create_method("builtin")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        segment_nuclei(picture, method, 0.25, tissue=None)
        seconds.append(time.perf_counter() - start)
    pixels = SIDE**2 / 1e6
    return pixels / min(seconds[1:]), pixels / statistics.median(seconds[1:])


def digest(nuclei: InstanceSet) -> str:
    """SHA-256 of everything that is known of the nuclei."""
    arrays = [nuclei.offsets, nuclei.points, *nuclei.table().values()]
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def compare_runs(name: str) -> None:
    """The same nuclei over tiles and threads."""
    picture, method = paint_tissue(TILED_SIDE), create_method(name, device="cpu")
    torch_threads, seen, count = torch.get_num_threads(), set(), 0
    runs = ((1024, 1), (2048, 2), (4096, 4), (1024, 2))
    for tile_px, threads in runs:
        set_thread_count(threads)
        torch.set_num_threads(threads)
        found = segment_nuclei(picture, method, 0.25, tile_px=tile_px, workers=threads, tissue=None)
        seen.add(digest(found))
        count = len(found)
    set_thread_count(None)
    torch.set_num_threads(torch_threads)
    described = ", ".join(f"{tile_px} by {threads}" for tile_px, threads in runs)
    print(f"| {name}: {count} nuclei with tiles of {described} threads | all bit-equal: {len(seen) == 1} |", flush=True)


def run_for_memory(side: int, painted: Path) -> None:
    """Go through a slide of ``side``² pixels that repeats a picture, and print its nuclei, their size and the peak.

    The picture comes from a file, because painting it takes more memory than all else.
    """
    keep_freed_memory()
    rows, columns = np.mgrid[: -(-side // 32), : -(-side // 32)]
    tissue = TissueMask(np.asarray((rows // 32 % 4 == 0) & (columns // 32 % 4 == 0)), 8.0)  # squares of 256 µm
    reader = RepeatingReader(np.load(painted), side)
    slide = Slide(f"{side}.tif", reader, (0.25, 0.25), reader.clock)
    start = time.perf_counter()
    found = segment_nuclei(slide, CheapMethod(), tissue=tissue)
    seconds = time.perf_counter() - start
    own = found.points.nbytes + found.offsets.nbytes + sum(values.nbytes for values in found.table().values())
    peak = peak_memory()
    print(f"{len(found)} {own / 2**20:.0f} {peak:.0f} {seconds:.1f}")


def run_for_geojson(count: int) -> None:
    """Write ``count`` octagons, and print seconds, MiB, and how far the peak rose."""
    corners = np.stack([np.arange(count) % 1000, np.arange(count) // 1000], axis=1) * 20
    ring = np.array([[3, 0], [7, 0], [10, 3], [10, 7], [7, 10], [3, 10], [0, 7], [0, 3]])
    small = segment_nuclei(paint_tissue(256), CheapMethod(), 0.25)
    column = np.linspace(0, 1, count, dtype=np.float32)
    nuclei = InstanceSet(
        offsets=np.arange(count + 1) * 8,
        points=(corners[:, None] + ring).reshape(-1, 2).astype(np.float32),
        centroid=corners + 5.0,
        area=column,
        score=column,
        measurements=dict.fromkeys(small.measurements, column),
        record=small.record,
    )
    before = peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "nuclei.geojson")
        start = time.perf_counter()
        nuclei.to_geojson(path)
        seconds = time.perf_counter() - start
        size = path.stat().st_size / 2**20
    rise = peak_memory() - before
    print(f"{seconds:.1f} {size:.0f} {rise:.0f}")


def _in_process(*arguments: object) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.nuclei_slide", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def compare_memory() -> None:
    """Peak memory on a slide and on one sixteen times as large."""
    first = 0.0
    with tempfile.TemporaryDirectory() as folder:
        painted = Path(folder, "tissue.npy")
        np.save(painted, paint_tissue(1024))
        for side in (10_000, 40_000):
            found, own, peak, seconds = _in_process("--memory", side, "--picture", painted)
            first = first or float(peak)
            share = f"{float(peak) / first:.2f} of the first"
            print(f"| {side}², {found} nuclei of {own} MiB | {peak} MiB | {share} | {seconds} s |", flush=True)


def main() -> None:
    """Print every table, or do one part in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=int, help="side of one slide")
    parser.add_argument("--picture", type=Path, help="NPY file of the picture that the slide repeats")
    parser.add_argument("--geojson", type=int, help="number of nuclei")
    chosen = parser.parse_args()
    if chosen.memory:
        run_for_memory(chosen.memory, chosen.picture)
        return
    if chosen.geojson:
        run_for_geojson(chosen.geojson)
        return
    print(describe_machine())
    keep_freed_memory()
    threads = torch.get_num_threads()
    set_thread_count(1)
    torch.set_num_threads(1)
    for name in ("stain", "student"):
        for tile_px in (512, 1024, 2048) if name == "stain" else (1024,):
            found = time_method(name, tile_px)
            print(
                f"| {name}, tiles of {tile_px}, {found.nuclei} nuclei | maps {found.maps:.1f} Mpx/s | after the maps "
                f"{found.after:.1f} Mpx/s of one core ({found.after / 16:.2f} mm²/s), goal {GOAL:g} | "
                f"{found.share:.1%} of the maps' time |",
                flush=True,
            )
    set_thread_count(None)
    torch.set_num_threads(threads)
    best, median = time_default()
    print(f"| default method end to end, {threads} threads | best {best:.2f}, median {median:.2f} Mpx/s |", flush=True)
    for name in ("stain", "student"):
        compare_runs(name)
    compare_memory()
    seconds, size, rise = _in_process("--geojson", 1_000_000)
    print(f"| GeoJSON of 1,000,000 nuclei | {seconds} s | {size} MiB | peak rose by {rise} MiB |", flush=True)


if __name__ == "__main__":
    main()
