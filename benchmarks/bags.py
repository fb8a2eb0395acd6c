"""Loading a bag from its store against reading its bytes: ``python -m benchmarks.bags [--repeats N] [--json FILE]``.

Everything lies in the disk cache. Ours checks every checksum and every value; the others check less or nothing. All are
timed in turns in this one process, medians.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks._common import Case, Timing, describe_machine, parse_options, run_cases, write_random_store
from wsi_engine import FeatureStore
from wsi_engine.bags import StoredBags

SIZES = ((20_000, 1536), (20_000, 1024), (2_000, 1024))
"""Tiles and numbers per tile of the bags; the goal is set for the first."""

GOAL = 1.3
"""Most times as long as ``numpy.fromfile`` that a bag may take."""


def cases(folder: Path, tiles: int, dim: int) -> list[Case]:
    """Our way and Zarr's, each against ``numpy.fromfile``."""
    store, raw = folder / f"{tiles}-{dim}.zarr", folder / f"{tiles}-{dim}.bin"
    features = write_random_store(store, tiles, dim)
    features.tofile(raw)
    bags, zarr = StoredBags([store]), FeatureStore.open(store)
    if not (np.array_equal(bags.load(0), features) and np.array_equal(zarr.features(), features)):
        raise AssertionError("the bag is not what was written")
    plain = partial(np.fromfile, raw, np.float16)
    size = f"bag of {tiles:,} × {dim:,}"
    return [
        Case(size, "numpy.fromfile", 1 / GOAL, partial(bags.load, 0), plain),
        Case(f"{size}, by Zarr", "numpy.fromfile", 1 / GOAL, zarr.features, plain),
    ]


def line(timing: Timing) -> str:
    """One line of the table; the ratio is how many times as long as ``numpy.fromfile`` it takes."""
    case = timing.case
    figures = f"{1e3 * timing.ours:.1f} ms | {1e3 * timing.theirs:.1f} ms | {1 / timing.ratio:.2f}× | {GOAL:g}×"
    return f"| {case.name} | {case.against} | {figures} |"


def main() -> None:
    """Measure every case and print the table."""
    repeats, keep = parse_options(__doc__, 21)
    print(f"{describe_machine()}, NumPy {np.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        every = (case for tiles, dim in SIZES for case in cases(Path(folder), tiles, dim))
        run_cases(every, line, repeats, keep)


if __name__ == "__main__":
    main()
