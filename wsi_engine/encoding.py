"""Slides through an encoder as one stream, each into its store: what :func:`~wsi_engine.extraction.extract` runs.

Slides are opened and laid out ahead of their turn (:mod:`wsi_engine.jobs`), their tiles are read into batches that run
on from slide to slide (:mod:`wsi_engine.feed`), and features are written behind the encoder by a thread of its own.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from wsi_engine.bottleneck import find_bottleneck
from wsi_engine.clock import STAGES
from wsi_engine.encoders.base import Encoder
from wsi_engine.errors import WsiError
from wsi_engine.failures import record_outcome
from wsi_engine.feed import BatchPart, MixedBatch, TileFeed
from wsi_engine.inputs import SlideSource
from wsi_engine.jobs import WHOLE, ExtractSettings, JobQueue, Share, SlideJob, SlideResult, features_job
from wsi_engine.places import Place
from wsi_engine.workers import usable_cores

log = logging.getLogger("wsi_engine")

_WRITES_BEHIND = 8
"""Batches whose features may wait for the disk before the encoder waits for it too."""


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


def extract_sources(
    sources: Sequence[SlideSource],
    out: Place,
    encoder: Encoder,
    settings: ExtractSettings,
    progress: Progress | None = None,
    share: Share = WHOLE,
    record: bool = True,
) -> ExtractReport:
    """:func:`~wsi_engine.extraction.extract` with its inputs found and checked and its encoder loaded.

    Args:
        sources: the slides.
        out: folder of the stores.
        encoder: it is called in this thread.
        settings: what to do with each slide.
        progress: told how the run goes.
        share: what is taken of each slide.
        record: failures are written down beside the stores; False where the caller does that.

    Raises:
        LargeSlide: a slide has more to encode than ``share`` allows.
    """
    if progress:
        progress.run_started(len(sources))
    start = time.perf_counter()
    workers = settings.workers or usable_cores()
    with ThreadPoolExecutor(workers, "tiles") as pool:
        jobs = JobQueue(
            list(sources), lambda source, pause: SlideJob(source, out, encoder, settings, pool, pause, share)
        )
        run = _Run(encoder, jobs, out if record else None, progress)
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

    def __init__(self, encoder: Encoder, jobs: JobQueue, out: Place | None, progress: Progress | None) -> None:
        self._encoder = encoder
        self._jobs = jobs
        self._out = out
        self._progress = progress
        self._flights: deque[_Flight] = deque()
        self._in_flight = 1 if isinstance(encoder, SubmittingEncoder) else 0
        self._landed = 0.0
        self._writes: deque[Future[None]] = deque()
        self._writer = ThreadPoolExecutor(1, "writer")
        self._told: SlideJob | None = None
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
                self.land_all()  # what was computed counts, and the slides of those batches are still open
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
            if self._out:
                job = features_job(self._encoder.card.name)
                record_outcome(self._out, result.slide_id, job, result.status, result.message)
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
        job.begin()
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
                self._tell(part)
        self._end(batch)

    def _tell(self, part: BatchPart) -> None:
        """Tell of a slide's tiles, behind those of the slide before: batches in flight hold tiles of several."""
        if self._progress is None:
            return
        job = self._jobs.jobs[part.source]
        if self._told is not job:
            self._told = job
            rows = len(job.grid)
            self._progress.slide_started(job.source.slide_id, rows, rows - len(part.source.rows))
        self._progress.tiles_done(len(part.rows))

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
