"""Slides in, features out: the main job, as one stream through all slides, safe to kill and to run again.

Slides are opened and laid out ahead of their turn (:mod:`wsi_engine.jobs`), their tiles are read into batches that run
on from slide to slide (:mod:`wsi_engine.feed`), and features are written behind the encoder by a thread of its own.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from wsi_engine.bottleneck import find_bottleneck
from wsi_engine.clock import STAGES
from wsi_engine.encoders import create_encoder
from wsi_engine.encoders.base import Encoder
from wsi_engine.errors import EncoderError, InputError, WsiError
from wsi_engine.feed import BatchPart, MixedBatch, TileFeed
from wsi_engine.grid import GridSettings, TissueChoice
from wsi_engine.inputs import SlideSource, find_slides
from wsi_engine.jobs import ExtractSettings, JobQueue, SlideJob, SlideResult
from wsi_engine.slide import open_slide
from wsi_engine.store import stored_precision
from wsi_engine.workers import usable_cores

log = logging.getLogger("wsi_engine")

_WRITES_BEHIND = 8
"""Batches whose features may wait for the disk before the encoder waits for it too."""

DEFAULT_ENCODER = "resnet50"

_SAMPLED_SLIDES = 20
"""Slides that are looked at to guess how many tiles a run has."""

_TISSUE_SHARE = 0.4
"""Share of a slide that is taken to be tissue in that guess."""


@dataclass(frozen=True)
class ExtractReport:
    """How a run ended, slide by slide in the order given. ``wall_seconds`` is the time from first to last slide."""

    encoder: str
    results: tuple[SlideResult, ...]
    precision: str = ""
    wall_seconds: float = 0.0
    workers: int = 1

    @property
    def failed(self) -> tuple[SlideResult, ...]:
        """The slides that have no features because of an error."""
        return tuple(result for result in self.results if result.status == "failed")

    @property
    def tiles(self) -> int:
        """Tiles of the slides finished in this run."""
        return sum(result.tiles for result in self.results if result.status == "done")

    @property
    def seconds(self) -> dict[str, float]:
        """Thread-seconds per stage of all slides."""
        return {stage: sum(result.seconds.get(stage, 0.0) for result in self.results) for stage in STAGES}

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        stage, advice = find_bottleneck(self.seconds, self.wall_seconds, self.workers)
        return {
            "encoder": self.encoder,
            "precision": self.precision,
            "wall_seconds": self.wall_seconds,
            "seconds": self.seconds,
            "bottleneck": {"stage": stage, "advice": advice},
            "slides": [asdict(result) for result in self.results],
        }


class Progress(Protocol):
    """Told how a run goes; every call comes from the thread that called :func:`extract`."""

    def run_started(self, slides: int) -> None:
        """The list of slides is checked; so many there are."""

    def slide_started(self, slide_id: str, tiles: int, done: int) -> None:
        """Encoding of a slide begins; ``done`` of its ``tiles`` are already stored by an earlier run."""

    def tiles_done(self, tiles: int) -> None:
        """So many more tiles of the slide that was started last are encoded."""

    def slide_finished(self, result: SlideResult) -> None:
        """A slide ended, well or not; the next may have begun before."""


@runtime_checkable
class SubmittingEncoder(Encoder, Protocol):
    """An encoder on a device that works beside the processor, so that copies and kernels overlap."""

    def submit(self, pixels: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        """Start on a batch; calling what is returned waits for its features."""
        ...

    def allocate(self, size: int) -> bytearray | memoryview:
        """Bytes for pixels from which the device copies fast."""
        ...


def extract(
    slides: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    encoder: str | Encoder = DEFAULT_ENCODER,
    weights: str | os.PathLike[str] | None = None,
    *,
    prompts: str | os.PathLike[str] | None = None,
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
    exact_resample: bool = False,
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
        prompts: ``prompts.safetensors`` (or ``encoder.safetensors``) of a fold of ``wsi train prompt``; the encoder is
            the one that it was trained in, and its features are kept apart from the plain ones.
        mpp: micrometres per tile pixel.
        tile_px: side of a tile in pixels.
        stride_px: step from tile to tile in pixels; None for ``tile_px``.
        tissue: which tiles to keep; see :func:`~wsi_engine.grid.lay_grid`.
        min_tissue: least part of a tile that must be tissue, 0–1.
        slide_mpp: micrometres per level-0 pixel, for slides whose header has none or a wrong one.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` …
        precision: ``auto`` (what the stores in ``out`` were made with, else the fastest that the device computes in
            natively), ``fp32``, ``bf16`` or ``fp16``, and any of them with ``+compile``.
        dtype: stored type; float16 is checked for overflow.
        batch_size: tiles encoded at a time.
        workers: reading threads; None for the number of usable cores.
        reader: ``auto`` or one reader's name.
        exact_resample: resample by the area filter alone; by default a reader may shrink the slide while it decodes.
        progress: told how the run goes.

    Raises:
        InputError: the list of slides cannot be used, or ``out`` cannot be written.
        EncoderError: the encoder or its weights cannot be loaded, or the prompts are of another backbone.
        SettingsError: a number is out of range.
    """
    settings = ExtractSettings(
        GridSettings(mpp, tile_px, stride_px, min_tissue), tissue, dtype, batch_size, workers, reader, exact_resample
    )
    named = [slides] if isinstance(slides, str | os.PathLike) else slides
    sources = find_slides(named, slide_mpp)
    folder = _make_folder(Path(out))
    origin = None if weights is None else os.fspath(weights)
    tuned = None
    if prompts is not None:
        from wsi_engine.encoders.prompted import check_tuned, create_tuned_encoder  # noqa: PLC0415 - loads torch

        asked = encoder if isinstance(encoder, str) else encoder.card.name
        tuned = check_tuned(prompts, None if encoder == DEFAULT_ENCODER else asked, mpp, tile_px)
    if isinstance(encoder, str):
        wanted = stored_precision(folder, tuned or encoder) if precision == "auto" else None
        tiles = guess_tiles(sources, settings) if wanted is None else None
        chosen = wanted or precision
        if prompts is None:
            encoder = create_encoder(encoder, origin, device, chosen, tiles)
        else:
            encoder = create_tuned_encoder(prompts, None, origin, device, chosen, tiles)
    elif prompts is not None:
        raise EncoderError(f"{prompts} goes into an encoder given by its name, not into one that is loaded; name it")
    return extract_sources(sources, folder, encoder, settings, progress)


def extract_sources(
    sources: Sequence[SlideSource],
    out: Path,
    encoder: Encoder,
    settings: ExtractSettings,
    progress: Progress | None = None,
) -> ExtractReport:
    """:func:`extract` with its inputs found and checked and its encoder loaded."""
    if progress:
        progress.run_started(len(sources))
    start = time.perf_counter()
    workers = settings.workers or usable_cores()
    with ThreadPoolExecutor(workers, "tiles") as pool:
        jobs = JobQueue(list(sources), lambda source: SlideJob(source, out, encoder, settings, pool))
        run = _Run(encoder, jobs, progress)
        allocate = encoder.allocate if isinstance(encoder, SubmittingEncoder) else bytearray
        feed = TileFeed(jobs, pool, settings.batch_size, settings.grid.tile_px, allocate)
        with jobs.running(), run.writing():
            try:
                for batch in feed:
                    run.encode(batch)
                    del batch  # or its buffer would be held while the next is waited for
                run.land_all()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # or the next slide would be laid out to the end
                raise
            finally:
                feed.close()
    run.report_ended()
    results = tuple(run.results[source.slide_id] for source in sources)
    return ExtractReport(encoder.card.name, results, encoder.precision, time.perf_counter() - start, workers)


@dataclass
class _Flight:
    """A batch that the encoder has been given."""

    batch: MixedBatch
    features: Callable[[], NDArray[np.float32]]
    begun: float


class _Run:
    """Takes batches to the encoder and their features to the slides' jobs."""

    def __init__(self, encoder: Encoder, jobs: JobQueue, progress: Progress | None) -> None:
        self._encoder = encoder
        self._jobs = jobs
        self._progress = progress
        self._flights: deque[_Flight] = deque()
        self._in_flight = 1 if isinstance(encoder, SubmittingEncoder) else 0
        self._landed = 0.0
        self._writes: deque[Future[None]] = deque()
        self._writer = ThreadPoolExecutor(1, "writer")
        self.results: dict[str, SlideResult] = {}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write within the context; at its end all that was handed over is written."""
        try:
            yield
        finally:
            self._writer.shutdown(wait=True)
        while self._writes:
            self._writes.popleft().result()

    def encode(self, batch: MixedBatch) -> None:
        """Encode a batch, and hand on what is ready."""
        for part in batch.parts:
            self._begin(part)
        if any(self._is_alive(part) for part in batch.parts):
            begun = time.perf_counter()
            try:
                self._flights.append(_Flight(batch, self._submit(batch.pixels), begun))
            except WsiError as error:
                self._fail(batch, error)
        else:
            self._flights.append(_Flight(batch, lambda: np.empty((0, 0), np.float32), time.perf_counter()))
        while len(self._flights) > self._in_flight:
            self._land(self._flights.popleft())
        self.report_ended()

    def land_all(self) -> None:
        """Hand on what is still with the encoder."""
        while self._flights:
            self._land(self._flights.popleft())

    def report_ended(self) -> None:
        """Tell of the slides that have ended since the last time."""
        while not self._jobs.ended.empty():
            result = self._jobs.ended.get()
            self.results[result.slide_id] = result
            if self._progress:
                self._progress.slide_finished(result)
            elif result.status == "no tissue":
                log.warning("%s: %s", result.slide_id, result.message)

    def _submit(self, pixels: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        if isinstance(self._encoder, SubmittingEncoder):
            return self._encoder.submit(pixels)
        features = self._encoder.encode(pixels)
        return lambda: features

    def _begin(self, part: BatchPart) -> None:
        """Note a slide's first batch, and an error of its reader."""
        job = self._jobs.jobs[part.source]
        if not job.begun:
            job.begin()
            if self._progress:
                rows = len(job.grid)
                self._progress.slide_started(job.source.slide_id, rows, rows - len(part.source.rows))
        if part.error is not None:
            if not isinstance(part.error, WsiError):
                raise part.error
            self._write(job.fail, part.error)

    def _is_alive(self, part: BatchPart) -> bool:
        return part.error is None and self._jobs.jobs[part.source].result is None

    def _fail(self, batch: MixedBatch, error: WsiError) -> None:
        """The encoder could not take a batch: every slide in it fails."""
        for part in batch.parts:
            part.source.stop()
            self._write(self._jobs.jobs[part.source].fail, error)
        self._end(batch)

    def _land(self, flight: _Flight) -> None:
        """Wait for a batch's features and hand them to their slides' jobs."""
        batch = flight.batch
        try:
            features = flight.features()
        except WsiError as error:
            self._fail(batch, error)
            return
        now = time.perf_counter()
        seconds, self._landed = now - max(flight.begun, self._landed), now
        for part in batch.parts:
            if self._is_alive(part):
                job = self._jobs.jobs[part.source]
                job.slide.clock.add("encode", seconds * len(part.rows) / max(1, batch.tiles))
                self._write(job.add, part.rows, features[part.place])
                if self._progress:
                    self._progress.tiles_done(len(part.rows))
        self._end(batch)

    def _end(self, batch: MixedBatch) -> None:
        """Close the slides of which nothing more comes, behind what is still to be written of them."""
        for source in batch.ended:
            job = self._jobs.jobs[source]
            self._write(self._close, job)

    def _close(self, job: SlideJob) -> None:
        result = job.close()
        del self._jobs.jobs[job.tiles]
        self._jobs.ended.put(result)

    def _write(self, action: Callable[..., None], *arguments: object) -> None:
        """Do something in the writing thread, and wait where too much waits already."""
        self._writes.append(self._writer.submit(action, *arguments))
        while len(self._writes) > _WRITES_BEHIND:
            self._writes.popleft().result()


def guess_tiles(sources: Sequence[SlideSource], settings: ExtractSettings) -> int:
    """About how many tiles a run has, from the sizes of some of its slides; those that cannot be opened count 0."""
    sampled = sources[:: max(1, len(sources) // _SAMPLED_SLIDES)]
    tiles = 0.0
    for source in sampled:
        try:
            with open_slide(source.path, source.mpp, settings.reader) as slide:
                sides = [
                    n * mpp / (settings.grid.mpp * settings.grid.step_px)
                    for n, mpp in zip(slide.dimensions, slide.mpp, strict=True)
                ]
        except WsiError:
            continue
        tiles += sides[0] * sides[1]
    share = 1.0 if settings.tissue is None else _TISSUE_SHARE
    return round(tiles * share * len(sources) / max(1, len(sampled)))


def _make_folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to the output folder {out}: {error.strerror or error}") from error
    return out
