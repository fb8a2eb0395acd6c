"""The slides of an extraction as tasks of a cluster: one a slide, several for a large one.

The workers run :func:`~wsi_engine.encoding.extract_sources` on one slide each, with its lease and all that makes it
safe to kill. A large slide is laid out by one task, its rows are encoded by others, each under a lease of its own, and
a last task completes it; meanwhile the caller holds the slide's lease, which keeps others away.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from wsi_engine.cluster.messages import Tally
from wsi_engine.cluster.places import WorkerShare, absolute_path
from wsi_engine.cluster.runner import Outcome, Runner, Task, run_one
from wsi_engine.cluster.session import Session
from wsi_engine.encoders.cards import TEXTURE
from wsi_engine.encoders.plan import EncoderPlan
from wsi_engine.encoding import ExtractReport, Progress
from wsi_engine.errors import BusyError, ClusterError, InputError, WsiError
from wsi_engine.failures import record_outcome
from wsi_engine.inputs import SlideSource
from wsi_engine.jobs import WHOLE, ExtractSettings, Share, SlideResult, features_job
from wsi_engine.lease import hold_lease
from wsi_engine.places import Place, as_place, is_url, write_file
from wsi_engine.remote import RemoteEncoder, SlideSpec, SpreadSlide, describe_encoder, extract_slide
from wsi_engine.version import __version__

log = logging.getLogger("wsi_engine")


def find_encoder(session: Session, plan: EncoderPlan) -> RemoteEncoder:
    """What a worker makes of a plan: with ``auto`` it decides the precision, for all workers.

    Raises:
        EncoderError: it cannot be made there.
        WeightsError: the weights are missing, unreadable or of the wrong shape.
        ClusterError: the worker has another version of the engine.
    """
    weights = plan.weights if plan.weights is None or not Path(plan.weights).exists() else absolute_path(plan.weights)
    plan = dataclasses.replace(plan, weights=weights, prompts=plan.prompts and absolute_path(plan.prompts))
    if plan.name == TEXTURE and plan.device == "auto":
        plan = dataclasses.replace(plan, device="cpu")  # it has no network, and need not wait for a GPU
    session.wait_for_worker()
    task = Task("encoder", describe_encoder, (plan, share_worker(session)))
    version, encoder = run_one(session, task, session.find_resources(plan.device))
    if version != __version__:
        raise ClusterError(
            f"the workers of {session.choice} run version {version} of the engine and this is {__version__}: "
            "install the same there"
        )
    assert isinstance(encoder, RemoteEncoder)
    return encoder


def share_worker(session: Session) -> WorkerShare:
    """What each worker of a session may use."""
    return WorkerShare(session.threads, session.peers, session.choice.kind == "local")


def extract_on_cluster(
    sources: Sequence[SlideSource],
    out: Place,
    encoder: RemoteEncoder,
    settings: ExtractSettings,
    session: Session,
    progress: Progress | None = None,
) -> ExtractReport:
    """:func:`~wsi_engine.encoding.extract_sources` by the workers of a cluster, with the same report and bytes.

    ``progress`` hears of several slides at a time: ``tiles_done`` is of any that has begun.

    Raises:
        ClusterError: the scheduler went away for too long, or a worker does not see ``out``.
        InputError: ``out`` cannot be written.
    """
    if progress:
        progress.run_started(len(sources))
    begun = time.perf_counter()
    with mark_folder(out) as mark:
        drive = _Drive(session, as_place(absolute_path(out)), encoder, settings, progress, mark)
        results = drive.run([absolute_source(source) for source in sources])
    threads = (settings.workers or encoder.threads) * session.count_workers()
    ordered = tuple(results[source.slide_id] for source in sources)
    return ExtractReport(encoder.card.name, ordered, encoder.precision, time.perf_counter() - begun, threads)


@contextmanager
def mark_folder(folder: Place) -> Iterator[str]:
    """Put a file into a folder for the ``with`` block, by which workers know that they see the same one; its name.

    Raises:
        InputError: the folder cannot be written.
    """
    path = folder / f".run-{uuid.uuid4().hex}"
    try:
        write_file(path, b"")
    except OSError as error:
        raise InputError(f"cannot write to the output folder {folder}: {error.strerror or error}") from error
    try:
        yield path.name
    finally:
        with suppress(OSError):
            path.unlink()


@dataclass
class _Parts:
    """A large slide whose parts are being encoded."""

    opened: ExitStack
    left: int
    begun: float
    results: list[SlideResult] = field(default_factory=list)


class _Drive:
    """Hands out a run's slides and takes in how they end."""

    def __init__(
        self,
        session: Session,
        out: Place,
        encoder: RemoteEncoder,
        settings: ExtractSettings,
        progress: Progress | None,
        mark: str,
    ) -> None:
        self._session, self._out, self._encoder, self._settings = session, out, encoder, settings
        self._progress, self._mark = progress, mark
        self._worker = share_worker(session)
        self._tally = Tally(self._slide_started, self._tiles_done)
        self._runner: Runner[SlideSpec] = Runner(session, session.find_resources(encoder.plan.device), self._tally.hear)
        self._parts: dict[str, _Parts] = {}
        self._results: dict[str, SlideResult] = {}

    def run(self, sources: Sequence[SlideSource]) -> dict[str, SlideResult]:
        """Do all slides; how each ended, by its name."""
        try:
            with self._runner:
                for source in sources:
                    self._submit(source, Share(most=self._session.choice.part_tiles))
                for outcome in self._runner.outcomes():
                    self._take(outcome)
        finally:
            for parts in self._parts.values():
                parts.opened.close()
        return self._results

    def _submit(self, source: SlideSource, share: Share, delay: float = 0.0) -> None:
        rows = "" if share.rows is None else f"-{share.rows.start}"
        spec = SlideSpec(
            source, self._out, self._encoder, self._settings, share, self._runner.topic, self._worker, self._mark
        )
        self._runner.submit(Task(f"extract-{source.slide_id}{rows}", extract_slide, spec), delay)

    def _take(self, outcome: Outcome[SlideSpec]) -> None:
        """A task has ended: its slide has, or goes on."""
        spec, value = outcome.task.spec, outcome.value
        if outcome.error is not None:
            value = SlideResult(spec.source.slide_id, spec.source.path, "failed", message=str(outcome.error))
        if isinstance(value, SpreadSlide):
            self._spread(spec.source, value)
        elif value.status == "busy":
            self._runner.try_later(outcome.task, spec.source.slide_id, value.message)
        elif spec.share.rows is not None:
            self._take_part(spec.source, value)
        else:
            self._end(value)

    def _spread(self, source: SlideSource, slide: SpreadSlide) -> None:
        """Hand out the parts of a large slide, under its lease."""
        opened = ExitStack()
        place, job = self._out / WHOLE.lease_name(source.slide_id), features_job(self._encoder.card.name)
        try:
            opened.enter_context(hold_lease(place, job, None))
        except BusyError:  # another process was faster
            self._submit(source, Share(most=self._session.choice.part_tiles), self._session.choice.retry_seconds)
            return
        except WsiError as error:
            self._end(SlideResult(source.slide_id, source.path, "failed", message=str(error)))
            return
        self._tally.begin(source.slide_id, slide.tiles, slide.tiles - slide.missing)
        self._parts[source.slide_id] = _Parts(opened, len(slide.parts), time.perf_counter())
        for rows in slide.parts:
            self._submit(source, Share(rows))

    def _take_part(self, source: SlideSource, result: SlideResult) -> None:
        """A part has ended; after the last, the slide is completed."""
        parts = self._parts[source.slide_id]
        parts.results.append(result)
        parts.left -= 1
        if parts.left:
            return
        parts.opened.close()
        failed = next((part for part in parts.results if part.status == "failed"), None)
        if failed:
            self._end(failed)
        else:
            self._submit(source, WHOLE)

    def _end(self, result: SlideResult) -> None:
        """A slide has ended."""
        parts = self._parts.pop(result.slide_id, None)
        if parts:
            seconds = {
                stage: sum(one.seconds.get(stage, 0.0) for one in (*parts.results, result))
                for one in (*parts.results, result)
                for stage in one.seconds
            }
            result = dataclasses.replace(result, seconds=seconds, wall_seconds=time.perf_counter() - parts.begun)
        self._results[result.slide_id] = result
        record_outcome(self._out, result.slide_id, features_job(self._encoder.card.name), result.status, result.message)
        if result.status == "done":
            self._tally.end(result.slide_id)
        if self._progress:
            self._progress.slide_finished(result)
        elif result.status == "no tissue":
            log.warning("%s: %s", result.slide_id, result.message)

    def _slide_started(self, slide_id: str, tiles: int, done: int) -> None:
        if self._progress:
            self._progress.slide_started(slide_id, tiles, done)

    def _tiles_done(self, tiles: int) -> None:
        if self._progress:
            self._progress.tiles_done(tiles)


def absolute_source(source: SlideSource) -> SlideSource:
    """A slide whose path means the same in a worker."""
    return source if is_url(source.path) else dataclasses.replace(source, path=absolute_path(source.path))
