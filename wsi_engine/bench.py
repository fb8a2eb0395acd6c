"""How fast this machine reads and encodes a slide, stage by stage, and how near each stage comes to its limit.

Everything is timed in one run, in turns, and given as the median of the repeats, so that ratios can be trusted where
absolute figures drift.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from wsi_engine.encoders.base import Encoder
from wsi_engine.errors import SettingsError, WsiError
from wsi_engine.extraction import extract
from wsi_engine.grid import TileGrid, lay_grid
from wsi_engine.memory import keep_freed_memory
from wsi_engine.readers.turbo import TurboReader
from wsi_engine.slide import Slide, open_slide
from wsi_engine.stream import stream_tiles
from wsi_engine.tissue import TissueMask
from wsi_engine.workers import usable_cores

_MASK_MPP = 8.0


@dataclass(frozen=True)
class Measurement:
    """Tiles per second of one way of doing one thing: the median of ``runs``."""

    name: str
    rate: float
    runs: tuple[float, ...]
    threads: int = 1


@dataclass(frozen=True)
class Ratio:
    """How one measurement stands to another."""

    name: str
    value: float


@dataclass(frozen=True)
class BenchReport:
    """What was measured on which tiles."""

    slide: str
    reader: str
    encoder: str
    precision: str
    mpp: float
    tile_px: int
    tiles: int
    batch_size: int
    cores: int
    measurements: tuple[Measurement, ...]
    ratios: tuple[Ratio, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


def run_bench(
    source: str,
    encoder: Encoder,
    *,
    slide_mpp: float | None = None,
    mpp: float = 0.5,
    tile_px: int = 256,
    tiles: int = 256,
    batch_size: int = 64,
    repeats: int = 3,
    told: Callable[[str], None] = lambda name: None,
) -> BenchReport:
    """Measure reading, encoding, and both together on some tiles of a slide.

    Args:
        source: path of a slide.
        encoder: what encodes.
        slide_mpp: micrometres per level-0 pixel, where the header has none.
        mpp: micrometres per tile pixel.
        tile_px: side of a tile in pixels.
        tiles: how many tiles, from the middle of the slide's tissue.
        batch_size: tiles encoded at a time.
        repeats: how often each is timed; medians count.
        told: called with the name of each measurement before it is made.

    Raises:
        SettingsError: a number is out of range, or the slide has no tile.
        WsiError: the slide cannot be read.
    """
    if tiles < 1 or repeats < 1:
        raise SettingsError(f"--tiles and --repeats must be at least 1, not {tiles} and {repeats}")
    keep_freed_memory()  # as in an extraction, whose buffers live from its first slide to its last
    with open_slide(source, slide_mpp) as slide:
        grid = some_tiles(slide, lay_grid(slide, mpp=mpp, tile_px=tile_px), tiles)
        reader = slide.reader
        works = _reading(source, slide_mpp, slide, grid)
        synthetic = np.random.default_rng(0).integers(0, 256, (batch_size, tile_px, tile_px, 3), np.uint8)
        works["encoder, synthetic tiles"] = (1, batch_size, lambda: encoder.encode(synthetic))
        mask = mask_of(slide, grid)
        works["end to end (wsi extract)"] = (
            usable_cores(),
            len(grid),
            lambda: _extract(source, slide_mpp, encoder, grid, mask, batch_size),
        )
        measured = measure(works, repeats, told)
    return BenchReport(
        source,
        reader,
        encoder.card.name,
        encoder.precision,
        mpp,
        tile_px,
        len(grid),
        batch_size,
        usable_cores(),
        tuple(measured.values()),
        tuple(_ratios(measured, reader)),
    )


Work = tuple[int, int, Callable[[], object]]
"""Threads, tiles, and what is to be timed."""


def measure(
    works: dict[str, Work], repeats: int, told: Callable[[str], None] = lambda name: None
) -> dict[str, Measurement]:
    """Time every work ``repeats`` times, in turns, after one call that does not count; a failing one is left out."""
    runs: dict[str, list[float]] = {}
    for turn in range(repeats + 1):
        for name, (_, tiles, work) in works.items():
            if turn and name not in runs:
                continue
            told(name)
            start = time.perf_counter()
            try:
                work()
            except WsiError:
                continue
            rate = tiles / (time.perf_counter() - start)
            runs[name] = [*runs.get(name, []), rate] if turn else []
    return {
        name: Measurement(name, statistics.median(rates), tuple(rates), works[name][0]) for name, rates in runs.items()
    }


def some_tiles(slide: Slide, grid: TileGrid, count: int) -> TileGrid:
    """The grid cut to ``count`` neighbouring tiles in its middle.

    Raises:
        SettingsError: the grid is empty.
    """
    if not len(grid):
        raise SettingsError(f"{slide.path} has no tile to measure with: choose a slide with tissue")
    start = max(0, (len(grid) - count) // 2)
    return replace(grid, origins=grid.origins[start : start + count])


def mask_of(slide: Slide, grid: TileGrid) -> TissueMask:
    """A tissue mask that covers just the tiles of a grid."""
    scale = slide.mpp[0] / _MASK_MPP, slide.mpp[1] / _MASK_MPP
    width, height = (int(np.ceil(n * s)) for n, s in zip(slide.dimensions, scale, strict=True))
    mask = np.zeros((height, width), bool)
    for x, y in grid.origins:
        x0, y0 = round(x * scale[0]), round(y * scale[1])
        x1 = round((x + grid.tile_size_level0[0]) * scale[0])
        y1 = round((y + grid.tile_size_level0[1]) * scale[1])
        mask[y0:y1, x0:x1] = True
    return TissueMask(mask, _MASK_MPP)


def _reading(source: str, slide_mpp: float | None, slide: Slide, grid: TileGrid) -> dict[str, Work]:
    """Ways to read the tiles: the bare decoder, each reader, and what most tools do."""
    works: dict[str, Work] = {}
    cores = sorted({1, usable_cores()})
    if isinstance(slide.backend, TurboReader):
        streams, size = compressed_tiles(slide, slide.backend, grid)
        for threads in cores:
            name = f"libjpeg-turbo alone, {_threads(threads)}"
            works[name] = (threads, len(grid), lambda n=threads: decode_all(streams, size, n))  # type: ignore[misc]
    for reader in ("turbo", "openslide", "tiffslide"):
        try:
            opened = open_slide(source, slide_mpp, reader)
        except WsiError:
            continue
        for threads in cores:
            name = f"reader {reader}, {_threads(threads)}"
            works[name] = (threads, len(grid), lambda s=opened, n=threads: drain(s, grid, n))  # type: ignore[misc]
    works["OpenSlide + PIL, 1 thread"] = (1, len(grid), lambda: read_plainly(source, grid))
    return works


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def compressed_tiles(slide: Slide, reader: TurboReader, grid: TileGrid) -> tuple[list[bytes], tuple[int, int]]:
    """The JPEG streams that hold a grid's tiles, each once, and the size (height, width) they are decoded to."""
    sampling = slide.sampling(grid.mpp)
    boxes = sampling.boxes(grid.origins, grid.tile_px, grid.tile_px)
    numbers = reader.touched_tiles(sampling.level, boxes, sampling.reduce)
    streams = [stream for number in numbers if (stream := reader.read_jpeg(sampling.level, int(number)))]
    height, width, _, _ = simplejpeg.decode_jpeg_header(streams[0])
    return streams, (height // sampling.reduce, width // sampling.reduce)


def decode_all(streams: list[bytes], size: tuple[int, int], threads: int) -> None:
    """Decode JPEG streams and throw the pixels away, each thread into memory of its own."""

    def decode(some: list[bytes]) -> None:
        pixels = np.empty((*size, 3), np.uint8)
        for stream in some:
            simplejpeg.decode_jpeg(stream, "RGB", False, False, *size, buffer=pixels, strict=False)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(decode, [streams[k::threads] for k in range(threads)]))


def drain(slide: Slide, grid: TileGrid, threads: int) -> None:
    """Stream all tiles of a grid and throw them away."""
    for batch in stream_tiles(slide, grid, workers=threads):
        del batch


def read_plainly(source: str, grid: TileGrid) -> None:
    """Read tiles one by one as most tools do: OpenSlide's ``read_region`` and Pillow's ``resize``."""
    for pixels in plain_tiles(source, grid):
        np.asarray(pixels)


def plain_tiles(source: str, grid: TileGrid) -> Any:
    """Tiles by OpenSlide and Pillow, one after the other, as Pillow images."""
    import openslide  # noqa: PLC0415

    try:
        slide = openslide.OpenSlide(source)
    except openslide.OpenSlideError as error:
        raise SettingsError(f"OpenSlide cannot read {source}: {error}") from error
    with slide:
        level = slide.get_best_level_for_downsample(grid.tile_size_level0[0] / grid.tile_px * 1.01)
        down = slide.level_downsamples[level]
        size = round(grid.tile_size_level0[0] / down), round(grid.tile_size_level0[1] / down)
        for x, y in grid.origins.tolist():
            tile = slide.read_region((x, y), level, size).convert("RGB")
            yield tile if tile.size == (grid.tile_px, grid.tile_px) else tile.resize((grid.tile_px, grid.tile_px))


def _extract(
    source: str, slide_mpp: float | None, encoder: Encoder, grid: TileGrid, mask: TissueMask, batch_size: int
) -> NDArray[Any] | None:
    with tempfile.TemporaryDirectory() as out:
        report = extract(
            source,
            Path(out),
            encoder,
            mpp=grid.mpp,
            tile_px=grid.tile_px,
            tissue=mask,
            min_tissue=0.5,
            slide_mpp=slide_mpp,
            batch_size=batch_size,
        )
        if report.failed:
            raise SettingsError(report.failed[0].message)
    return None


def _ratios(measured: dict[str, Measurement], reader: str) -> list[Ratio]:
    """How near each stage comes to its limit, and how it stands to what most tools do."""
    cores = usable_cores()
    rates = {name: one.rate for name, one in measured.items()}
    streaming = f"reader {reader}, {_threads(cores)}"
    together = "end to end (wsi extract)"
    pairs = [
        (f"{streaming} / libjpeg-turbo alone", streaming, f"libjpeg-turbo alone, {_threads(cores)}"),
        (f"reader {reader} / OpenSlide + PIL, 1 thread", f"reader {reader}, 1 thread", "OpenSlide + PIL, 1 thread"),
    ]
    found = [Ratio(name, rates[a] / rates[b]) for name, a, b in pairs if a in rates and b in rates]
    limits = [rates[name] for name in (streaming, "encoder, synthetic tiles") if name in rates]
    if together in rates and limits:
        found.append(Ratio("end to end / the slower of reader and encoder", rates[together] / min(limits)))
    return found
