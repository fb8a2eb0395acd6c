"""Reading, encoding and both together, against what other tools do: ``python -m benchmarks.speed``.

Every ratio is of two things measured in this one run, in turns; figures are medians. Options: ``--quick`` measures
fewer tiles, ``--json FILE`` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import timm
import torch

from benchmarks._common import describe_machine
from benchmarks.slides import big_slide, small_slides
from wsi_engine import bench, extract, lay_grid, open_slide
from wsi_engine.bench import Work, compressed_tiles, decode_all, drain, measure, read_plainly, some_tiles
from wsi_engine.encoders import create_encoder
from wsi_engine.memory import keep_freed_memory
from wsi_engine.readers.turbo import TurboReader

BATCH = 64


@dataclass(frozen=True)
class Row:
    """One line of the table: rates in tiles per second."""

    what: str
    ours: float
    other: float
    target: float | None

    @property
    def ratio(self) -> float:
        """How many times the other's rate ours is."""
        return self.ours / self.other


def reading(tiles: int, repeats: int) -> list[Row]:
    """Turbo against OpenSlide and Pillow by one thread, and against the bare decoder by two."""
    keep_freed_memory()  # for both sides
    path = str(big_slide())
    rows = []
    for mpp, target in ((0.25, 5.0), (0.5, 9.0)):
        with open_slide(path, reader="turbo") as slide:
            grid = some_tiles(slide, lay_grid(slide, mpp=mpp, tissue=None), tiles)
            works: dict[str, Work] = {
                "turbo": (1, len(grid), lambda s=slide, g=grid: drain(s, g, 1)),  # type: ignore[misc]
                "plain": (1, len(grid), lambda g=grid: read_plainly(path, g)),  # type: ignore[misc]
            }
            done = measure(works, repeats)
        what = f"256-px tiles at {mpp} mpp from 0.25, 1 thread: turbo / OpenSlide + PIL"
        rows.append(Row(what, done["turbo"].rate, done["plain"].rate, target))
    for mpp in (0.25, 0.5):
        with open_slide(path, reader="turbo") as slide:
            assert isinstance(slide.backend, TurboReader)
            grid = some_tiles(slide, lay_grid(slide, mpp=mpp, tissue=None), 4 * tiles)
            streams, size = compressed_tiles(slide, slide.backend, grid)
            works = {
                "stream": (2, len(grid), lambda s=slide, g=grid: drain(s, g, 2)),  # type: ignore[misc]
                "limit": (2, len(grid), lambda c=streams, z=size: decode_all(c, z, 2)),  # type: ignore[misc]
            }
            done = measure(works, 2 * repeats)
        what = f"streaming at {mpp} mpp, 2 threads / libjpeg-turbo alone, 2 threads"
        rows.append(Row(what, done["stream"].rate, done["limit"].rate, 0.85))
    return rows


def encoding(repeats: int, compiled: bool) -> list[Row]:
    """ResNet50 as the engine runs it by default against PyTorch in fp32, both with freed memory kept."""
    keep_freed_memory()
    torch.manual_seed(0)
    plain = timm.create_model("resnet50", pretrained=False, features_only=True, out_indices=(3,)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 224, 224, 3), np.uint8)
    images = torch.randn(32, 3, 224, 224)

    def run_plain() -> None:
        with torch.inference_mode():
            plain(images)

    default = create_encoder("resnet50", "random:0", "cpu")
    works: dict[str, Work] = {"plain": (2, 32, run_plain), "default": (2, 32, lambda: default.encode(pixels))}
    if compiled:
        fast = create_encoder("resnet50", "random:0", "cpu", "bf16+compile")
        works["compiled"] = (2, 32, lambda: fast.encode(pixels))
    done = measure(works, 3 * repeats)
    rows = [Row(f"ResNet50, 224 px, {default.precision} / fp32 PyTorch", done["default"].rate, done["plain"].rate, 2.5)]
    if compiled:
        rows.append(
            Row("ResNet50, 224 px, bf16+compile / fp32 PyTorch", done["compiled"].rate, done["plain"].rate, 4.0)
        )
    return rows


def end_to_end(side: int, tiles: int | None) -> list[Row]:
    """Whole processes, start-up included: ``wsi extract`` against the plain loop on the same tiles."""
    path = big_slide(side)
    with open_slide(path) as slide, tempfile.TemporaryDirectory() as folder:
        grid = lay_grid(slide, mpp=0.5, tissue=None)
        if tiles:
            grid = some_tiles(slide, grid, tiles)
        origins = Path(folder) / "origins.npy"
        np.save(origins, grid.origins)
        options = ["-o", folder, "--encoder", "resnet50", "--weights", "random:0", "--tissue", "none"]
        ours = _seconds([sys.executable, "-m", "wsi_engine.cli", "extract", str(path), *options])
        side = str(round(grid.tile_size_level0[0]))
        plain = _seconds([sys.executable, "-m", "benchmarks.plain_loop", str(path), str(origins), side])
        all_tiles = len(lay_grid(slide, mpp=0.5, tissue=None))
    what = "ResNet50 end to end, whole process: wsi extract / OpenSlide + PIL + fp32 PyTorch loop"
    return [Row(what, all_tiles / ours, len(grid) / plain, 6.0)]


def limits(tiles: int, repeats: int) -> list[Row]:
    """End to end against the slower of reading alone and encoding alone."""
    encoder = create_encoder("resnet50", "random:0", "cpu")
    report = bench.run_bench(str(big_slide()), encoder, tiles=tiles, batch_size=BATCH, repeats=repeats)
    rates = {one.name: one.rate for one in report.measurements}
    slower = min(rates["reader turbo, 2 threads"], rates["encoder, synthetic tiles"])
    together = rates["end to end (wsi extract)"]
    return [Row("end to end / the slower of reading alone and encoding alone", together, slower, 0.95)]


def many_slides(repeats: int) -> list[Row]:
    """Twenty small slides in one run against one big slide with about as many tiles."""
    encoder = create_encoder("resnet50", "random:0", "cpu")

    def rate(source: Path) -> Callable[[], float]:
        def run() -> float:
            with tempfile.TemporaryDirectory() as out:
                report = extract(source, out, encoder, tissue=None, batch_size=BATCH)
            return report.tiles / report.wall_seconds

        return run

    runs = {"small": rate(small_slides()), "big": rate(big_slide())}
    rates: dict[str, list[float]] = {"small": [], "big": []}
    for _ in range(repeats):
        for name, run in runs.items():
            rates[name].append(run())
    small, big = (float(np.median(rates[name])) for name in ("small", "big"))
    return [Row("20 small slides in one run / one big slide", small, big, 0.95)]


def _seconds(command: list[str]) -> float:
    import time  # noqa: PLC0415

    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Measure all and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer tiles and repeats")
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    parser.add_argument("--only", nargs="*", help="reading encoding end_to_end limits many_slides")
    options = parser.parse_args()
    repeats = 1 if options.quick else 5
    parts: dict[str, Callable[[], list[Row]]] = {
        "reading": lambda: reading(256 if options.quick else 1024, repeats),
        "encoding": lambda: encoding(repeats, not options.quick),
        "limits": lambda: limits(128 if options.quick else 512, min(repeats, 3)),
        "many_slides": lambda: many_slides(1 if options.quick else 2),
        "end_to_end": lambda: end_to_end(16_384, 128) if options.quick else end_to_end(24_576, None),
    }
    print(describe_machine(), flush=True)
    print(f"torch {torch.__version__}, timm {timm.__version__}", flush=True)
    rows = []
    for name, part in parts.items():
        if not options.only or name in options.only:
            for row in part():
                rows.append(row)
                goal = f"{row.target:g}×" if row.target else "–"
                print(f"| {row.what} | {row.ours:.1f} | {row.other:.1f} | {row.ratio:.2f}× | {goal} |", flush=True)
    if options.json:
        figures = [asdict(row) | {"ratio": row.ratio} for row in rows]
        options.json.write_text(json.dumps({"machine": describe_machine(), "rows": figures}, indent=2))


if __name__ == "__main__":
    main()
