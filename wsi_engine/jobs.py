"""The slides of a run: each is opened and laid out ahead of its turn, written behind it, and closed in the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from queue import Empty, Full, Queue
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsi_engine.encoders.base import Encoder
from wsi_engine.errors import BusyError, MismatchError, SettingsError, WsiError
from wsi_engine.feed import TileSource
from wsi_engine.grid import GridSettings, TileGrid, TissueChoice, lay_grid_on, tissue_settings
from wsi_engine.inputs import SlideSource
from wsi_engine.lease import Pause, hold_lease
from wsi_engine.places import Place
from wsi_engine.slide import Slide, open_slide
from wsi_engine.slide_record import SlideRecord
from wsi_engine.store import FeatureStore, features_key
from wsi_engine.tissue import TissueMask, detect_tissue
from wsi_engine.writer import FeatureIdentity, FeatureWriter

Status = Literal["done", "already complete", "no tissue", "busy", "failed"]

PREPARED_AHEAD = 2
"""Slides that are opened and laid out before their turn."""


@dataclass(frozen=True)
class ExtractSettings:
    """What to do with each slide.

    ``tissue`` is a choice of :func:`~wsi_engine.grid.lay_grid`. ``dtype`` is how features are stored.
    ``batch_size`` tiles are encoded at a time; ``workers`` threads read (None: the usable cores).
    ``exact_resample`` keeps readers from shrinking while they decode.
    """

    grid: GridSettings = field(default_factory=GridSettings)
    tissue: TissueChoice = "otsu"
    dtype: Literal["float16", "float32"] = "float16"
    batch_size: int = 64
    workers: int | None = None
    reader: str = "auto"
    exact_resample: bool = False

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
    """How one slide ended.

    ``seconds`` are thread-seconds per stage; ``wall_seconds`` what passed from its first batch to its end.
    """

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
class Share:
    """What one job takes of a slide whose rows are spread over several.

    Attributes:
        rows: of the grid, whole stored batches; None for all. A job of some rows leaves the array for a later one to
            complete.
        most: rows that one job takes on: a slide with more that are missing is refused with :class:`LargeSlide`.
    """

    rows: range | None = None
    most: int | None = None

    def lease_name(self, slide_id: str) -> str:
        """The lease that keeps others from the same rows."""
        return f".{slide_id}.lease" if self.rows is None else f".{slide_id}.{self.rows.start}-{self.rows.stop}.lease"


WHOLE = Share()
"""All of a slide."""


class LargeSlide(Exception):
    """A slide has more to encode than one job takes; its store, its grid and an array to write into are there.

    Attributes:
        tiles: rows of its grid.
        missing: rows that are to be encoded.
        parts: ranges of rows with something missing, cut at stored batches.
    """

    def __init__(self, tiles: int, missing: int, parts: tuple[range, ...]) -> None:
        super().__init__(tiles, missing, parts)
        self.tiles, self.missing, self.parts = tiles, missing, parts


class SlideJob:
    """One slide that is open, laid out and held by this process's lease until :meth:`close`.

    Made by one thread, encoded by another and written by a third, one after the other.
    """

    def __init__(
        self,
        source: SlideSource,
        out: Place,
        encoder: Encoder,
        settings: ExtractSettings,
        pool: Executor,
        pause: Pause | None = None,
        share: Share = WHOLE,
    ) -> None:
        """Open the slide and its store, and find what is missing there; ``pause`` is that of the slide's lease.

        Raises:
            LargeSlide: more is missing than ``share`` allows.
            BusyError: another process writes this slide.
            WsiError: the slide or its store cannot be used; nothing is left open.
        """
        self.source = source
        self.result: SlideResult | None = None
        """How it ended, once it has."""
        self._path = out / f"{source.slide_id}.zarr"
        self._begun: float | None = None
        self._share = share
        with ExitStack() as stack:
            self.slide = stack.enter_context(open_slide(source.path, source.mpp, settings.reader))
            record = SlideRecord.of(self.slide, source.slide_id)
            job = features_job(encoder.card.name)
            lease = stack.enter_context(hold_lease(out / share.lease_name(source.slide_id), job, pause))
            self._store, self.grid = open_store(self._path, record, self.slide, settings, pool)
            identity = FeatureIdentity(
                encoder.card, settings.grid.name, self.grid, encoder.precision, settings.dtype, settings.exact_resample
            )
            self._writer = FeatureWriter(self._store, identity, settings.batch_size, lease.check)
            self.already_complete = self._writer.complete
            missing = self._writer.missing_rows(share.rows)
            if share.most is not None and len(missing) > share.most:
                self._writer.begin()
                raise LargeSlide(len(self.grid), len(missing), _cut(missing, share.most, self._writer.batch_size))
            self.tiles = TileSource(self.slide, self.grid, missing, settings.exact_resample)
            self._opened = stack.pop_all()

    def begin(self) -> None:
        """Its first tiles are about to be encoded."""
        self._begun = self._begun or time.perf_counter()

    @property
    def begun(self) -> bool:
        """Whether :meth:`begin` was called."""
        return self._begun is not None

    def add(self, rows: NDArray[np.int64], features: NDArray[np.float32]) -> None:
        """Write features of some rows; an error ends the job."""
        if self.result is not None:
            return
        try:
            with self.slide.clock.measure("write"):
                self._writer.add(rows, features)
        except WsiError as error:
            self.fail(error)

    def fail(self, error: WsiError) -> None:
        """End the job with an error; what is stored so far stays for the next run."""
        if self.result is None:
            self.tiles.stop()
            self.result = self._end("busy" if isinstance(error, BusyError) else "failed", str(error))

    def close(self) -> SlideResult:
        """Complete the features unless the job has failed, and give back the slide and its lease."""
        try:
            if self.result is None:
                self.result = self._finish()
        except WsiError as error:
            self.fail(error)
        finally:
            self.release()
        assert self.result is not None
        return self.result

    def release(self) -> None:
        """Give back the slide and its lease, whatever was written."""
        self._opened.close()

    def _finish(self) -> SlideResult:
        if self.already_complete:
            return self._end("already complete")
        if self._share.rows is not None:
            return self._end("done")
        self._writer.finish(self.slide.clock.seconds())
        return self._end("done") if len(self.grid) else self._end("no tissue", _explain_empty(self._store))

    def _end(self, status: Status, message: str = "") -> SlideResult:
        return SlideResult(
            self.source.slide_id,
            self.source.path,
            status,
            0 if status in ("failed", "busy") else len(self.grid),
            "" if status in ("failed", "busy") else str(self._path),
            message,
            self.slide.reader,
            time.perf_counter() - self._begun if self._begun else 0.0,
            self.slide.clock.seconds(),
        )


def _cut(missing: NDArray[np.int64], most: int, batch_size: int) -> tuple[range, ...]:
    """Ranges of whole batches and at most ``most`` rows (or one batch) in which rows are missing, at fixed places."""
    side = max(1, most // batch_size) * batch_size
    return tuple(range(number * side, (number + 1) * side) for number in np.unique(missing // side).tolist())


def features_job(encoder: str) -> str:
    """What the features of an encoder are called where jobs are told apart: their place in a store."""
    return f"features/{features_key(encoder)}"


def open_store(
    path: Place, record: SlideRecord, slide: Slide, settings: ExtractSettings, pool: Executor
) -> tuple[FeatureStore, TileGrid]:
    """The slide's store, and its grid under these settings: the stored one, else a new one, which is stored.

    The caller holds the slide's lease. A new store is made only once its grid is known, so that a slide that cannot be
    read leaves nothing behind.

    Raises:
        MismatchError: the store is of another slide, or its grid of this name was laid with other settings.
        WsiError: the slide or the store cannot be used.
    """
    name = settings.grid.name
    wanted = settings.grid_json()
    store = FeatureStore.create(path, record) if (path / "zarr.json").exists() else None
    had = store.grid_settings(name) if store else None
    if had is None:
        tissue = settings.tissue if isinstance(settings.tissue, TissueMask) else None
        detector = tissue_settings(settings.tissue)
        if detector:
            tissue = detect_tissue(slide, detector, pool)
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


def _explain_empty(store: FeatureStore) -> str:
    """Why a slide has no tile, in one sentence."""
    tissue = store.tissue()
    if tissue is None:
        return "the grid has no tile"
    emptied = tissue.emptied_by()
    if emptied:
        return f'no tissue was found (the filter "{emptied}" left none): look at the slide, or pass --tissue none'
    return "no tile has enough tissue: lower --min-tissue or the tile size"


class JobQueue:
    """Makes the jobs of a run in a thread of its own, a few ahead of their turn.

    A feed takes their tiles (:class:`~wsi_engine.feed.Sources`). Slides with nothing to encode never come out of
    :meth:`next`; how they ended is in :attr:`ended`, as is that of slides that could not be opened. Slides that other
    processes write are tried once more at the end: by then they may be done, or their writers dead.
    """

    def __init__(self, sources: list[SlideSource], make: Callable[[SlideSource, Pause | None], SlideJob]) -> None:
        self._make = make
        self._queue: Queue[SlideJob | BaseException | None] = Queue(PREPARED_AHEAD)
        self._stopped = threading.Event()
        self.ended: Queue[SlideResult] = Queue()
        self.jobs: dict[TileSource, SlideJob] = {}
        """Jobs that were handed out and have not been taken away yet."""
        self._thread = threading.Thread(target=self._run, args=(sources,), name="prepare", daemon=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Make jobs within the context; jobs that were made and not handed out are released at its end."""
        self._thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            while self._thread.is_alive() or not self._queue.empty():
                try:
                    job = self._queue.get(timeout=0.05)
                except Empty:
                    continue
                if isinstance(job, SlideJob):
                    job.release()
            for job in self.jobs.values():
                job.release()

    def ready(self) -> bool:
        """Whether :meth:`next` would return at once."""
        return not self._queue.empty()

    def next(self) -> TileSource | None:
        """The tiles of the next slide that has any to encode; None after the last. Waits for it."""
        job = self._queue.get()
        if isinstance(job, BaseException):
            raise job
        if job is None:
            return None
        self.jobs[job.tiles] = job
        return job.tiles

    def _run(self, sources: list[SlideSource]) -> None:
        try:
            held = [source for source in sources if not self._prepare(source, None)]
            for source in held:
                self._prepare(source, self._stopped.wait)
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _prepare(self, source: SlideSource, pause: Pause | None) -> bool:
        """Make a slide's job and put it into the queue; False where its lease is held and is to be tried again."""
        if self._stopped.is_set():
            return True
        try:
            job = self._make(source, pause)
        except WsiError as error:
            busy = isinstance(error, BusyError)
            if busy and pause is None:
                return False
            self.ended.put(SlideResult(source.slide_id, source.path, "busy" if busy else "failed", message=str(error)))
            return True
        if len(job.tiles.rows):
            self._put(job)
        else:
            self.ended.put(job.close())
        return True

    def _put(self, job: SlideJob | BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(job, timeout=0.1)
            except Full:
                continue
            return
        if isinstance(job, SlideJob):
            job.release()
