"""Slides in, features out: the main job, slide after slide, safe to kill and to run again."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from wsi_engine.encoders import create_encoder
from wsi_engine.encoders.base import Encoder
from wsi_engine.errors import BusyError, InputError, MismatchError, SettingsError, WsiError
from wsi_engine.grid import GridSettings, TileGrid, TissueChoice, lay_grid_on, tissue_settings
from wsi_engine.inputs import SlideSource, find_slides
from wsi_engine.lease import hold_lease
from wsi_engine.slide import Slide, open_slide
from wsi_engine.store import FeatureStore, SlideRecord
from wsi_engine.stream import stream_tiles
from wsi_engine.tissue import TissueMask, detect_tissue
from wsi_engine.writer import FeatureIdentity, FeatureWriter

log = logging.getLogger("wsi_engine")

Status = Literal["done", "already complete", "no tissue", "busy", "failed"]


@dataclass(frozen=True)
class ExtractSettings:
    """What to do with each slide.

    ``tissue`` is a choice of :func:`~wsi_engine.grid.lay_grid`. ``dtype`` is how features are stored.
    ``batch_size`` tiles are encoded at a time; ``workers`` threads read (None: the usable cores).
    """

    grid: GridSettings = field(default_factory=GridSettings)
    tissue: TissueChoice = "otsu"
    dtype: Literal["float16", "float32"] = "float16"
    batch_size: int = 64
    workers: int | None = None
    reader: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "float32"):
            raise SettingsError(f"--dtype must be float16 or float32, not {self.dtype}")
        if self.batch_size < 1:
            raise SettingsError(f"--batch-size must be at least 1, not {self.batch_size}")
        if self.workers is not None and self.workers < 1:
            raise SettingsError(f"--workers must be at least 1, not {self.workers}")
        tissue_settings(self.tissue)

    def grid_json(self) -> dict[str, Any]:
        """The settings that decide a grid, as a store remembers them."""
        detector = tissue_settings(self.tissue)
        tissue: Any = self.tissue.digest if isinstance(self.tissue, TissueMask) else detector and detector.to_json()
        return asdict(self.grid) | {"stride_px": self.grid.step_px, "tissue": tissue}


@dataclass(frozen=True)
class SlideResult:
    """How one slide ended. ``seconds`` are thread-seconds per stage; ``wall_seconds`` what the user waited."""

    slide_id: str
    path: str
    status: Status
    tiles: int = 0
    store: str = ""
    message: str = ""
    reader: str = ""
    wall_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ExtractReport:
    """How a run ended, slide by slide in the order given."""

    encoder: str
    results: tuple[SlideResult, ...]

    @property
    def failed(self) -> tuple[SlideResult, ...]:
        """The slides that have no features because of an error."""
        return tuple(result for result in self.results if result.status == "failed")

    @property
    def tiles(self) -> int:
        """Tiles of the slides finished in this run."""
        return sum(result.tiles for result in self.results if result.status == "done")

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {"encoder": self.encoder, "slides": [asdict(result) for result in self.results]}


class Progress(Protocol):
    """Told how a run goes; every call comes from the thread that called :func:`extract`."""

    def run_started(self, slides: int) -> None:
        """The list of slides is checked; so many there are."""

    def slide_started(self, slide_id: str, tiles: int, done: int) -> None:
        """Encoding of a slide begins; ``done`` of its ``tiles`` are already stored by an earlier run."""

    def tiles_done(self, tiles: int) -> None:
        """So many more tiles are encoded."""

    def slide_finished(self, result: SlideResult) -> None:
        """A slide ended, well or not."""


def extract(
    slides: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    encoder: str | Encoder = "resnet50",
    weights: str | os.PathLike[str] | None = None,
    *,
    mpp: float = 0.5,
    tile_px: int = 256,
    stride_px: int | None = None,
    tissue: TissueChoice = "otsu",
    min_tissue: float = 0.25,
    slide_mpp: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int = 64,
    workers: int | None = None,
    reader: str = "auto",
    progress: Progress | None = None,
) -> ExtractReport:
    """Extract features of slides into one store each, ``<out>/<slide_id>.zarr``.

    Safe to kill at any instant and to run again: finished slides are skipped, a slide in progress goes on where it
    stopped and ends in the same bytes. A slide that cannot be done does not stop the others; the report says why.

    Args:
        slides: a slide, folder, CSV or URL, or several of them (see :func:`~wsi_engine.inputs.find_slides`).
        out: folder of the stores, made if it is not there.
        encoder: name of an encoder (``wsi encoders`` lists them) or one already loaded.
        weights: file of weights, ``random:SEED``, or None for the published ones.
        mpp: micrometres per tile pixel.
        tile_px: side of a tile in pixels.
        stride_px: step from tile to tile in pixels; None for ``tile_px``.
        tissue: which tiles to keep; see :func:`~wsi_engine.grid.lay_grid`.
        min_tissue: least part of a tile that must be tissue, 0–1.
        slide_mpp: micrometres per level-0 pixel, for slides whose header has none or a wrong one.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` …
        precision: ``auto`` or ``fp32``.
        dtype: stored type; float16 is checked for overflow.
        batch_size: tiles encoded at a time.
        workers: reading threads; None for the number of usable cores.
        reader: ``auto`` or one reader's name.
        progress: told how the run goes.

    Raises:
        InputError: the list of slides cannot be used, or ``out`` cannot be written.
        EncoderError: the encoder or its weights cannot be loaded.
        SettingsError: a number is out of range.
    """
    settings = ExtractSettings(
        GridSettings(mpp, tile_px, stride_px, min_tissue), tissue, dtype, batch_size, workers, reader
    )
    named = [slides] if isinstance(slides, str | os.PathLike) else slides
    sources = find_slides(named, slide_mpp)
    folder = _make_folder(Path(out))
    origin = None if weights is None else os.fspath(weights)
    loaded = create_encoder(encoder, origin, device, precision) if isinstance(encoder, str) else encoder
    return extract_sources(sources, folder, loaded, settings, progress)


def extract_sources(
    sources: Sequence[SlideSource],
    out: Path,
    encoder: Encoder,
    settings: ExtractSettings,
    progress: Progress | None = None,
) -> ExtractReport:
    """:func:`extract` with its inputs found and checked and its encoder loaded."""
    results = []
    if progress:
        progress.run_started(len(sources))
    for source in sources:
        start = time.perf_counter()
        try:
            result = _extract_slide(source, out, encoder, settings, progress)
        except BusyError as error:
            result = SlideResult(source.slide_id, source.path, "busy", message=str(error))
        except WsiError as error:
            result = SlideResult(source.slide_id, source.path, "failed", message=str(error))
        result = replace(result, wall_seconds=time.perf_counter() - start)
        results.append(result)
        if progress:
            progress.slide_finished(result)
    return ExtractReport(encoder.card.name, tuple(results))


def _extract_slide(
    source: SlideSource, out: Path, encoder: Encoder, settings: ExtractSettings, progress: Progress | None
) -> SlideResult:
    path = out / f"{source.slide_id}.zarr"
    with open_slide(source.path, source.mpp, settings.reader) as slide:
        record = SlideRecord.of(slide, source.slide_id)
        with hold_lease(out / f".{source.slide_id}.lease"):
            store, grid = _open_store(path, record, slide, settings)
            writer = FeatureWriter(
                store,
                FeatureIdentity(encoder.card, settings.grid.name, grid, encoder.precision, settings.dtype),
                settings.batch_size,
            )
            finished = SlideResult(
                source.slide_id, source.path, "already complete", len(grid), str(path), reader=slide.reader
            )
            if writer.complete:
                return finished
            _encode_missing(slide, source.slide_id, grid, encoder, writer, settings, progress)
            writer.finish(slide.clock.seconds())
    status: Status = "done" if len(grid) else "no tissue"
    message = "" if len(grid) else _explain_empty(store)
    if message and not progress:
        log.warning("%s: %s", source.slide_id, message)
    return replace(finished, status=status, message=message, seconds=slide.clock.seconds())


def _open_store(
    path: Path, record: SlideRecord, slide: Slide, settings: ExtractSettings
) -> tuple[FeatureStore, TileGrid]:
    """The slide's store, and its grid under these settings: the stored one, else a new one, which is stored.

    A new store is made only once its grid is known, so that a slide that cannot be read leaves nothing behind.
    """
    name = settings.grid.name
    wanted = settings.grid_json()
    store = FeatureStore.create(path, record) if path.exists() else None
    had = store.grid_settings(name) if store else None
    if had is None:
        tissue = settings.tissue if isinstance(settings.tissue, TissueMask) else None
        detector = tissue_settings(settings.tissue)
        if detector:
            tissue = detect_tissue(slide, detector, settings.workers)
        grid = lay_grid_on(slide, settings.grid, tissue)
        store = store or FeatureStore.create(path, record)
        store.write_grid(name, grid, wanted, tissue)
        return store, grid
    assert store
    differing = [key for key in wanted if had.get(key) != wanted[key]]
    if differing:
        changes = "; ".join(f"{key} {had.get(key)}, now {wanted[key]}" for key in differing)
        raise MismatchError(
            f"the grid {name} of {store.path} was laid differently ({changes}): choose another output folder, or "
            "delete that store"
        )
    return store, store.grid(name)


def _encode_missing(
    slide: Slide,
    slide_id: str,
    grid: TileGrid,
    encoder: Encoder,
    writer: FeatureWriter,
    settings: ExtractSettings,
    progress: Progress | None,
) -> None:
    """Encode the batches that are not stored yet; each is written while the next is encoded."""
    missing = writer.missing_batches()
    size = writer.batch_size
    if progress:
        left = sum(min(size, len(grid) - int(b) * size) for b in missing)
        progress.slide_started(slide_id, len(grid), len(grid) - left)
    clock = slide.clock

    def write(batch: int, features: Any) -> None:
        with clock.measure("write"):
            writer.write(batch, features)

    with ThreadPoolExecutor(1, "writer") as pool:
        last: Future[None] | None = None
        for tiles in stream_tiles(slide, grid, size, settings.workers, missing):
            with clock.measure("encode"):
                features = encoder.encode(tiles.padded)[: len(tiles)]
            if last:
                last.result()
            last = pool.submit(write, int(tiles.index[0]) // size, features)
            if progress:
                progress.tiles_done(len(tiles))
        if last:
            last.result()


def _explain_empty(store: FeatureStore) -> str:
    """Why a slide has no tile, in one sentence."""
    tissue = store.tissue()
    if tissue is None:
        return "the grid has no tile"
    emptied = tissue.emptied_by()
    if emptied:
        return f'no tissue was found (the filter "{emptied}" left none): look at the slide, or pass --tissue none'
    return "no tile has enough tissue: lower --min-tissue or the tile size"


def _make_folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to the output folder {out}: {error.strerror or error}") from error
    return out
